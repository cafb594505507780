"""How the gradient of a run comes about: in full, or sketched in backpropagation."""

from collections.abc import Callable
from typing import Any

import jax

import flora_jax as fj
from experiments.common.methods import Method

Loss = Callable[[Any, Any, Any, jax.Array], jax.Array]
"""loss(params, frozen, batch, key): nats per token, a scalar."""
Gradient = Callable[[Loss, Any], Callable[..., tuple[jax.Array, Any]]]
"""From a loss and the optimizer's state to a function of the loss's arguments: its
value, and what the optimizer takes as its gradient."""


def full(loss: Loss, opt_state: Any) -> Callable[..., tuple[jax.Array, Any]]:
    """The gradient itself."""
    del opt_state
    return jax.value_and_grad(loss)


def of(method: Method, sketch: fj.Sketch) -> Gradient:
    """Returns how the gradients of a method come about."""
    if not method.sketched_gradients:
        return full

    def sketched(loss: Loss, opt_state: Any) -> Callable[..., tuple[jax.Array, Any]]:
        value_and_grad = fj.sketched_value_and_grad(loss, sketch)
        return lambda *arguments: value_and_grad(opt_state, *arguments)

    return sketched
