"""The exact optimum of small batches, over all schedules."""
