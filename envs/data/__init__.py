"""Compact tables of measured figures that the package ships."""
