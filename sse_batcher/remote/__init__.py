"""Streams over HTTP, as a client outside of the server gets them, with the standard library. For commands.

Internal. See "Commands" in docs/explanation/architecture.md.
"""
