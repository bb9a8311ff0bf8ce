"""Train the policy ``calendar``: CMA-ES over whole episodes in compiled code."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("train_calendar")
