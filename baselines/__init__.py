"""Baseline policies, the offline planner and their registry."""
