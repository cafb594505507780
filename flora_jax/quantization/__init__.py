"""How moments are stored: codes of 8 or 16 bits."""
