"""What the checks of the paper's rules share."""
