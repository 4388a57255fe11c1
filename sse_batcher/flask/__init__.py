"""The Flask extension. Only this package, and the command line with its demo, import Flask.

See "The way of a request" in docs/explanation/architecture.md.
"""
