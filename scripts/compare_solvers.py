"""Compare the planner's solvers with the paper's way, and show the hard band of the packing."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("compare_solvers")
