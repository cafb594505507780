"""FLORA as the transformation of an nnx.Optimizer.

python -m experiments.examples.nnx
"""

import jax
import jax.numpy as jnp
from flax import nnx

import flora_jax as fj


@nnx.jit
def step(model, optimizer, x, y):
    """One update; model and optimizer change in place."""

    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main() -> None:
    """Trains, and prints the loss and the bytes of the optimizer's state."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (512, 256))
    y = jnp.sin(x @ jax.random.normal(keys[1], (256, 256)) / 16)
    rngs = nnx.Rngs(0)
    up, down = nnx.Linear(256, 1024, rngs=rngs), nnx.Linear(1024, 256, rngs=rngs)
    model = nnx.Sequential(up, nnx.relu, down)
    tx = fj.flora(0.1, fj.Sketch(64, mask=fj.not_embeddings))
    print(fj.memory_plan(tx, nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for i in range(60):
        value = step(model, optimizer, x, y)
        if i % 20 == 0 or i == 59:
            print(f"update {i}: loss {value:.4f}")


if __name__ == "__main__":
    main()
