"""Detached streams hold no thread of the server: one loop in each process drives them all."""
