"""Detached streams: they hold no thread of the server; one loop per process drives them all."""
