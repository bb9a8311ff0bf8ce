"""Does comparing C_p with C_d pick the better action? Both are tried, on known distributions."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("check_iteration_rule")
