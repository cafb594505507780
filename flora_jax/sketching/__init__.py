"""A tree's leaves to their sketches and back."""
