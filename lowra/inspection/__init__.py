"""What `lowra inspect` shows of a packed checkpoint: bits, bytes, errors, and the paper's pictures."""
