"""Measure what a layer of a large model costs on a GPU, and write a cost model of all its layers."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("profile_gpu")
