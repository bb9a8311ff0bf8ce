"""``python -m servegym``: the command ``servegym``."""

from servegym.studies.start import run_servegym

if __name__ == "__main__":  # workers import this module under another name
    run_servegym()
