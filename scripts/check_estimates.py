"""How wrong estimates of output lengths propagate through plan, stealing, iteration rule and queues."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("check_estimates")
