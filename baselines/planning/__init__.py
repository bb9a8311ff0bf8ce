"""The offline plan: which client serves which requests, so that the largest load is least."""
