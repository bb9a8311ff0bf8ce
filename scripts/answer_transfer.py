"""When moving running requests between replicas pays: bandwidth, lengths, skew; copy or recompute."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("answer_transfer")
