"""How many clients: fixed counts against admission that looks at memory, by memory and length variance."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("answer_clients")
