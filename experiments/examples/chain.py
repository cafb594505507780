"""FLORA in an optax chain, on plain parameters.

python -m experiments.examples.chain
"""

import jax
import jax.numpy as jnp
import optax

import flora_jax as fj


def loss(params, x, y):
    """Mean squared error of a network with one hidden layer."""
    hidden = jax.nn.relu(x @ params["up"] + params["bias"])
    return jnp.mean((hidden @ params["down"] - y) ** 2)


def main() -> None:
    """Trains, and prints the loss and the bytes of the optimizer's state."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": jax.random.normal(keys[0], (256, 1024)) / 16,
        "bias": jnp.zeros(1024),
        "down": jax.random.normal(keys[1], (1024, 256)) / 32,
    }
    x = jax.random.normal(keys[2], (512, 256))
    y = jnp.sin(x @ jax.random.normal(keys[3], (256, 256)) / 16)

    tx = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        fj.compressed_momentum(0.9, fj.Sketch(64), resample_every=100),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(3e-3, 60)),
    )
    print(fj.memory_plan(tx, params))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for i in range(60):
        params, state, value = step(params, state)
        if i % 20 == 0 or i == 59:
            print(f"update {i}: loss {value:.4f}")


if __name__ == "__main__":
    main()
