"""Multiple devices: shardings of the state, and compressed collectives."""
