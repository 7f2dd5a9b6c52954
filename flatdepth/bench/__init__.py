"""Experiments: speed, kills, paste borders, and all that needs a GPU."""
