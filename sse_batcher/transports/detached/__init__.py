"""Detached streams hold no thread of the server: one loop in each process drives them all.

See "The way of a request" and "Live and behind" in docs/explanation/architecture.md.
"""
