"""Open questions of the paper, answered by playing: moving requests, how many clients, large clusters."""
