"""Sketched gradients accumulated over micro-batches, in one jitted step.

python -m experiments.examples.microbatch
"""

import jax
import jax.numpy as jnp
import optax

import flora_jax as fj

SKETCH, MEAN = fj.Sketch(64), optax.microbatching.AccumulationType.MEAN


def loss(params, batch):
    """Mean squared error of a network with one hidden layer."""
    x, y = batch
    return jnp.mean((jax.nn.relu(x @ params["up"]) @ params["down"] - y) ** 2)


def main() -> None:
    """Trains, and prints the loss."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": jax.random.normal(keys[0], (256, 1024)) / 16,
        "down": jax.random.normal(keys[1], (1024, 256)) / 32,
    }
    x = jax.random.normal(keys[2], (512, 256))
    y = jnp.sin(x @ jax.random.normal(keys[3], (256, 256)) / 16)
    tx = optax.adafactor(0.1)
    value_and_grad = fj.sketched_value_and_grad(loss, SKETCH)

    @jax.jit
    def step(params, state, i):
        # The step number decides the projection, of sketches and of accumulator.
        _, grad = optax.microbatching.microbatch(
            value_and_grad,
            argnums=2,
            microbatch_size=128,
            accumulator=(MEAN, fj.compressed_accumulator(SKETCH, step=i)),
        )(SKETCH.cycle(i), params, (x, y))
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(41):
        if i % 20 == 0:
            print(f"update {i}: loss {loss(params, (x, y)):.4f}")
        params, state = step(params, state, i)


if __name__ == "__main__":
    main()
