"""Real engines in studies: what they serve, how they are shown, calibrated and compared."""
