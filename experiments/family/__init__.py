"""The low-rank family compared, each at its tuned learning rate."""
