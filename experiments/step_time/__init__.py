"""How long an optimizer step takes, beside the peers and beside the floor."""
