"""Proven lower bounds on the makespan of a batch on one replica."""
