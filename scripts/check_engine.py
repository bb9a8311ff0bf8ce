"""Policies on a real engine beside the simulator: iterations, tokens, makespans."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("check_engine")
