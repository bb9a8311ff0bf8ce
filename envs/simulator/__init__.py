"""The compiled simulator: array state, stages, admission rules and the decision loop."""
