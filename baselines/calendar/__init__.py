"""The joint planner: stages and assignments of a whole batch at once."""
