"""The study of trained agents: runs, play on held-out cases, report."""
