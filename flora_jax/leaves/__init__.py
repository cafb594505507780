"""From the leaves of a tree to matrices, and the trees of state kept for them."""
