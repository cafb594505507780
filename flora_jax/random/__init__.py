"""Random bits that never change, and the keys they are made from."""
