"""Play policies on the same held-out cases; write one row per episode and a summary."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("evaluate")
