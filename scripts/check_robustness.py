"""Try wrong arguments, damaged files, odd terminals and kills on every script."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("check_robustness")
