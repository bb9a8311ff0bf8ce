"""Measure speed: the simulator, the environment, the policies, the planner. One core."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("benchmark")
