"""Any inner transformation inside a subspace of each gradient."""
