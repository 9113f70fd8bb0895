"""Training of value networks: `ivl train` and what it writes. Importing this package imports no torch."""
