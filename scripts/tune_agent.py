"""Search hyper-parameters for an agent with Optuna; run it again to go on, or beside itself to go faster."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("tune_agent")
