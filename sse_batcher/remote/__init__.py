"""Streams over HTTP, as a client outside of the server gets them. For the commands `tail`, `load` and `doctor`.

Internal. With the standard library only.
"""
