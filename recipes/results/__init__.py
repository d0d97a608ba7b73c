"""Measured results: one row a run, and the tables made of them."""
