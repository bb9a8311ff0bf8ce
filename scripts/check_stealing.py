"""What stealing is worth, by how well output lengths are predicted: each rule with and without it."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("check_stealing")
