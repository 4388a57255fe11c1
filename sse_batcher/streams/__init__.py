"""Streams: which clients get which frames, and what is kept for those that return."""
