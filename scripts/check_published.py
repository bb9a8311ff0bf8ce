"""Published figures of real engines beside the simulator: watermark, recomputation, memory, mixed passes."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("check_published")
