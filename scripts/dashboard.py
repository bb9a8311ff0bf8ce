"""Draw a training run as one picture, from its event files."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("dashboard")
