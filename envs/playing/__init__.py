"""Playing policies on cases: the policy protocol, evaluation, and how results are kept."""
