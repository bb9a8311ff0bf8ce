"""Copy the result tables into README.md, between their markers."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("readme")
