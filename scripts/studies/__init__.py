"""What the scripts run: commands, studies and the checks behind the tables of results/."""
