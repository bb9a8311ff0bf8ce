"""Assign a workload's requests to clients so that the busiest client has as little to do as can be."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("plan")
