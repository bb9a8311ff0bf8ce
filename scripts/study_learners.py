"""Compare what may learn to schedule, on equal CPU time: searches, imitation, PPO. Table, curves, picture."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("study_learners")
