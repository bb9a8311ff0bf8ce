"""Tune the number of each rule on training seeds, in compiled code."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("tune")
