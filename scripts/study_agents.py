"""The study of trained agents: train, play held-out cases, transfer, tables and pictures."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("study_agents")
