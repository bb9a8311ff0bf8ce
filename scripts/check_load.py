"""What the machines of registered tasks bear by the formula and as served, beside what is offered."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("check_load")
