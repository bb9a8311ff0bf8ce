"""Beyond 1,000 clients: planning time, cost of a decision and gap to the bound, up to 20,000 clients."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("answer_scale")
