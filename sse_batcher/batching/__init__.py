"""Batching: what travels together, and when.

See "The way of an event" in docs/explanation/architecture.md.
"""
