"""What is served: requests, workloads, predictions of their lengths, offline plans."""
