"""Tasks: their configuration, the registered ones, and the cases that a seed makes of them."""
