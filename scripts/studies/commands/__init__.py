"""One module for each script: its options and what it does."""
