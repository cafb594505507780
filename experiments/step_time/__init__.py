"""How long an optimizer step takes, compared with peers and with the floor."""
