"""Queues that are known exactly, beside the simulator: mean waits and the rates that a replica can bear."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("check_queueing")
