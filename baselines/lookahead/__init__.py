"""Policies and verdicts that finish the episode in imagination."""
