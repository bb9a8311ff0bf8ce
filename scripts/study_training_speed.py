"""Compare ways to train for speed: CPU time a decision, gap against CPU minutes, held-out cases."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("study_training_speed")
