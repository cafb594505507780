"""Which projection trains best at which rank."""
