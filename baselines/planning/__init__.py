"""The offline plan: requests to clients so that the busiest has as little to do as can be."""
