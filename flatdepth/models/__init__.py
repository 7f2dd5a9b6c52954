"""Depth models and their weight files."""
