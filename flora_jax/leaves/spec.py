"""What a state means, written into it: a vector that survives a checkpoint.

A sketch can only be read with the settings that made it. Jitted code cannot raise on
values, so every state carries ``spec``, its settings as a short text in a uint32
vector of fixed length, and :func:`verify_state` compares it on the host.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora_jax import _validation as _checks

FORMAT = 2
_WORDS = 64
_HEADER = 4  # Format, checksum of the whole text, and the two words of the root key.
_TEXT_BYTES = 4 * (_WORDS - _HEADER)


def make_spec(name: str, key: Any, **settings: Any) -> jax.Array:
    """Encodes the settings under which a state can be read.

    Args:
      name: the transformation's name.
      key: its root key data, uint32 of shape (2,), possibly traced.
      **settings: what else decides the meaning of the state, in this order.

    Returns:
      A uint32 vector of 64 words.
    """
    pairs = {"transformation": name, **settings}
    text = "; ".join(f"{k}: {v}" for k, v in pairs.items()).encode()
    padded = text[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    words = np.frombuffer(padded, "<u4").astype(np.uint32)
    head = np.array([FORMAT, zlib.crc32(text)], np.uint32)
    return jnp.concatenate([head, key, words])


def verify_state(tx: optax.GradientTransformation, state: Any) -> None:
    """Raises if ``state`` was made under other settings than those of ``tx``.

    Call it after restoring a checkpoint: a state of the same shapes but of another
    seed, projection or interval would train on noise without an error. It compares
    host values and cannot be jitted. Settings that only change what is done with a
    state (rates, decays, readings) may differ; those that plan leaves may not, even
    where they would plan the same.

    Args:
      tx: the transformation that will use the state, in any chain or wrapper.
      state: its state, restored into the structure that ``tx.init`` gives.

    Raises:
      TypeError: if a spec is no longer uint32, because the whole state was cast.
      ValueError: if settings differ, naming both, or if a spec is missing or stacked.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> state = fj.flora(1e-3, rank=8, key=0).init({"w": jnp.zeros((256, 256))})
      >>> fj.verify_state(fj.flora(1e-3, rank=8, key=0), state)
    """
    tx = _checks.check_transformation("tx", tx)
    fresh = []

    def init(params: Any) -> Any:
        # map_params calls this with a placeholder that every optax wrapper knows, so
        # that a fresh state is made without the parameters.
        fresh.append(tx.init(params))
        return fresh[0]

    try:
        jax.tree.map(lambda _: None, optax.tree.map_params(init, lambda x: x, state))
    except (TypeError, ValueError) as error:
        if not fresh:
            raise
        raise ValueError(
            "`state` must have the structure that `tx` gives it, got another one;"
            " restore the checkpoint into the structure of tx.init(params)"
        ) from error
    expected, found = _specs(fresh[0]), _specs(state)
    if expected.keys() != found.keys():
        raise ValueError(
            "`state` must hold the specs that `tx` writes, got specs at"
            f" {sorted(found)}, expected at {sorted(expected)}; restore the checkpoint"
            " into the structure of tx.init(params)"
        )
    differences = [
        f"{path or 'state'}: {line}"
        for path, spec in expected.items()
        for line in _differences(found[path], spec)
    ]
    if differences:
        raise ValueError(
            "`state` was made under other settings than `tx` has, got "
            + "; ".join(differences)
            + ". Use the settings of the run that saved it, or start a new state with"
            " tx.init"
        )


def _specs(tree: Any) -> dict[str, np.ndarray]:
    """All fields named ``spec``, by the path of the state they stand in."""
    specs = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        if names[-1:] == ["value"]:  # NNX keeps each array of the state in a Variable.
            names.pop()
        if names and names[-1] == "spec":
            specs["/".join(names[:-1])] = np.asarray(leaf)
    return specs


def _differences(found: np.ndarray, expected: np.ndarray) -> list[str]:
    if found.dtype != np.uint32:
        raise TypeError(
            f"`state.spec` must be uint32, got {found.dtype}; the whole state was cast:"
            " restore it uncast"
        )
    if found.shape != expected.shape:
        raise ValueError(
            f"`state.spec` must have shape {expected.shape}, got {found.shape}; pass"
            " the states of a vmapped ensemble one by one"
        )
    if (found == expected).all():
        return []
    if found[0] != expected[0]:
        return [f"state format {found[0]} in the state, {expected[0]} in tx"]
    ours, theirs = _decode(expected), _decode(found)
    lines = [
        f"{name} {theirs.get(name, 'absent')} in the state, {value} in tx"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    return lines or [f"settings {theirs} in the state, {ours} in tx"]


def _decode(spec: np.ndarray) -> dict[str, str]:
    text = spec[_HEADER:].astype("<u4").tobytes().rstrip(b"\0").decode(errors="replace")
    pairs = (item.partition(": ") for item in text.split("; "))
    settings = {name: value for name, _, value in pairs}
    return {**settings, "key data": str(spec[2:_HEADER].tolist())}
