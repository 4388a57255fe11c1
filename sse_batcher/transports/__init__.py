"""Transports: who drives a stream."""
