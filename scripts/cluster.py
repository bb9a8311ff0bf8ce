"""The schedulers that people know on the five tasks of clusters, memory and traffic, in one table."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("cluster")
