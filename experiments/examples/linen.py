"""FLORA's gradient accumulation in a Linen TrainState.

python -m experiments.examples.linen
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.training.train_state import TrainState

import flora_jax as fj


@jax.jit
def step(state, x, y):
    """One micro-step; each fourth of them updates the parameters."""

    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def main() -> None:
    """Trains, and prints the loss and the bytes of the optimizer's state."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (512, 256))
    y = jnp.sin(x @ jax.random.normal(keys[1], (256, 256)) / 16)
    model = linen.Sequential([linen.Dense(1024), linen.relu, linen.Dense(256)])
    params = model.init(keys[2], x)["params"]
    tx = fj.compressed_accumulation(optax.adafactor(0.1), 4, fj.Sketch(64))
    print(fj.memory_plan(tx, params))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for i in range(100):
        part = slice(128 * (i % 4), 128 * (i % 4) + 128)
        state, value = step(state, x[part], y[part])
        if i % 32 == 0 or i == 99:
            print(f"micro-step {i}: loss {value:.4f}")


if __name__ == "__main__":
    main()
