"""The compiled simulator: array state, physics, admission rules and the decision loop."""
