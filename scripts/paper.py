"""The paper's comparison: baseline → offline plan → + stealing → + iteration rule, and simple rows."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("paper")
