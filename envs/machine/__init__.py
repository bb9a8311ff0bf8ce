"""What a stage costs: cost models, lowered to tables, and presets of them."""
