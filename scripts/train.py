"""Train an agent by the task's usual learner, PPO or another; go on after a kill with --resume."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("train")
