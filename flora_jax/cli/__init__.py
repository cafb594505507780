"""The command line: ``python -m flora_jax plan``."""
