"""Retrieval by distance: tasks, and the probe that measures them."""
