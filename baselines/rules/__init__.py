"""Policies that pair an admission rule with a trigger, and compiled episodes under them."""
