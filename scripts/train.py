"""Train an agent with PPO; go on after a kill with --resume; watch it with TensorBoard."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("train")
