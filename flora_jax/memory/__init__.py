"""Memory planning: sizes of optimizer states, and ranks that fit a budget."""
