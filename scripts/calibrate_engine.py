"""Fit a cost model to an engine: run a grid of iterations, or read a log of them."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("calibrate_engine")
