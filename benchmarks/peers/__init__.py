"""What `many.py` compares with: one file for each, and the bare loop, which is the limit of all in Python."""
