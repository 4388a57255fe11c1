"""Batching: what travels together, and when."""
