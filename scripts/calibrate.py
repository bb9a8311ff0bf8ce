"""Calibrate Paper-v0's cost model to the published numbers, and show what they leave open."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("calibrate")
