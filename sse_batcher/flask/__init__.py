"""The Flask extension. Only this package imports Flask."""
