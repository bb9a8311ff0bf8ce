"""Wrong arguments, damaged files, odd terminals and kills, tried on every script."""
