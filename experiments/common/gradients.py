"""How the gradient of a training comes about: in full, or as sketches."""

from collections.abc import Callable
from typing import Any

import jax

import flora_jax as fj
from experiments.common.optimizers import Recipe, rules

Loss = Callable[[Any, Any, Any, jax.Array], jax.Array]
"""loss(params, frozen, batch, key): nats per token, a scalar."""
ValueAndGrad = Callable[..., tuple[jax.Array, Any]]
Gradient = Callable[[Loss, Any], ValueAndGrad]
"""From a loss and the optimizer's state to a function of the loss's arguments: its
value, and what the optimizer takes as its gradient."""


def full(loss: Loss, opt_state: Any) -> ValueAndGrad:
    """The gradient itself."""
    del opt_state
    return jax.value_and_grad(loss)


def of(recipe: Recipe) -> Gradient:
    """Returns what the optimizer of a recipe is given."""
    if recipe.accumulation != "flora" or not recipe.sketched_gradients:
        return full

    def sketched(loss: Loss, opt_state: Any) -> ValueAndGrad:
        return fj.sketched_value_and_grad(
            loss, key=opt_state.key, step=opt_state.gradient_step, **rules(recipe)
        )

    return sketched
