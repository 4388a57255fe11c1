"""The Redis backend: all processes with the same Redis stream have one history."""

from .backend import open_redis

__all__ = ["open_redis"]
