"""Runtime: what the library has of threads, locks and processes."""
