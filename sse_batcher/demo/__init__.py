"""The demo: a simulated hub, its events batched and not, in a browser or as a report.

See "Where to find what" in docs/explanation/architecture.md.
"""
