"""What schedulers can do where output lengths are uncertain: policies, pulls and plans compared."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("study_uncertainty")
