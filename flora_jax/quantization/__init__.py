"""How moments are stored: block-wise codes of 8 or 16 bits."""
