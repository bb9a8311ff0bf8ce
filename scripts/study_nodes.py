"""How far studies on a cluster scale: two local workers measured, 1, 10 and 100 nodes simulated."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("study_nodes")
