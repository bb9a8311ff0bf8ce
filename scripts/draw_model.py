"""Draw one small episode with the words of the model beside it."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("draw_model")
