"""What state costs, and how much of it a budget buys."""

from flora_jax.memory.budget import rank_for_budget
from flora_jax.memory.planner import LeafMemory, MemoryPlan, memory_plan
from flora_jax.memory.ranks import ranks_for_budget

__all__ = [
    "LeafMemory",
    "MemoryPlan",
    "memory_plan",
    "rank_for_budget",
    "ranks_for_budget",
]
