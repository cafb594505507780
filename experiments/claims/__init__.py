"""The paper's claims, measured on small models."""
