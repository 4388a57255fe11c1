"""The Redis backend: all processes with the same Redis stream have one history.

See "The way of an event" and "How each fault keeps the promise" in docs/explanation/architecture.md.
"""

from .backend import open_redis

__all__ = ["open_redis"]
