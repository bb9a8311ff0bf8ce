"""Train calendars from several seeds and evaluate them on held-out cases: table, curves, page's numbers."""

from servegym.studies.start import run_command

if __name__ == "__main__":
    run_command("study_calendar")
