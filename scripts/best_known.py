"""Search for the best schedule of each case with all lengths known; tabulate what rules leave."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("best_known")
