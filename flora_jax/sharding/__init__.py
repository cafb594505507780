"""Many devices: where state lies, and what they send one another."""
