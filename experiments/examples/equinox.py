"""AdamW on sketches for an Equinox module.

python -m experiments.examples.equinox
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import flora_jax as fj


def loss(model, x, y):
    """Mean squared error."""
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def main() -> None:
    """Trains, and prints the loss and the bytes of the optimizer's state."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (512, 256))
    y = jnp.sin(x @ jax.random.normal(keys[1], (256, 256)) / 16)
    model = eqx.nn.MLP(256, 256, width_size=1024, depth=1, key=keys[2])
    tx = fj.flora_adamw(3e-3, fj.Sketch(64), refresh_every=20)
    # The state is of the arrays alone: activation functions are leaves as well.
    arrays = eqx.filter(model, eqx.is_inexact_array)
    print(fj.memory_plan(tx, arrays))

    @eqx.filter_jit
    def step(model, state):
        value, grads = eqx.filter_value_and_grad(loss)(model, x, y)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, arrays)
        return eqx.apply_updates(model, updates), state, value

    state = tx.init(arrays)
    for i in range(60):
        model, state, value = step(model, state)
        if i % 20 == 0 or i == 59:
            print(f"update {i}: loss {value:.4f}")


if __name__ == "__main__":
    main()
