"""Streams: which clients get which frames, and what is kept for those that return.

See "The promise", and "Live and behind", in docs/explanation/architecture.md.
"""
