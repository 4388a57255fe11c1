"""Commands for operators that look at a site from outside: `tail`, `load` and the counters.

`sse_batcher.cli` and `sse_batcher.flask.cli` give them their arguments. See "Commands" in
docs/explanation/architecture.md.
"""
