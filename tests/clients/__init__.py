"""Real trainers, each in an environment of its own; see tests/clients/README.md."""
