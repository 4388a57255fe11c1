"""Commands for operators that look at a site from outside: `tail`, `load` and the counters.

Internal. `sse_batcher.cli` and `sse_batcher.flask.cli` give them their arguments.
"""
