"""The Flask extension. Only this package, and the command line with its demo, import Flask."""
