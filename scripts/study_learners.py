"""Compare learners on equal CPU time: curves, held-out cases, one picture."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("study_learners")
