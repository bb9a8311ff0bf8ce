"""Policies that never evict beside the least sum of latencies that hindsight could have had."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("check_hindsight")
