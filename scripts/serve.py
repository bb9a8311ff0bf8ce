"""Serve a real small model under any policy, and show it live."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("serve")
