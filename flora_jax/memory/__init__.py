"""What state costs, and how much of it a budget buys."""

from flora_jax.memory._ranks import ranks_for_budget

__all__ = ["ranks_for_budget"]
