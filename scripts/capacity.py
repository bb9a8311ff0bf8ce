"""The highest arrival rate at which a policy meets the limits of so many requests, by bisection."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("capacity")
