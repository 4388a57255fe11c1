"""Runtime: what the library has of threads, locks and processes.

See "Threads" and "Locks" in docs/explanation/architecture.md.
"""
