"""What a state means, written into it: a vector that survives a checkpoint.

A sketch can only be decompressed with the settings that it was made with. Jitted code
cannot raise on values, so every state carries ``spec``, its settings as a short text in
a uint32 vector of fixed length, and :func:`verify_state` compares it on the host.
"""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora_jax import _validation as check
from flora_jax.leaves.paths import abstract_state, is_masked, named_arrays
from flora_jax.leaves.rules import LeafRules

FORMAT = 6
_WORDS = 64
# Format, checksum of the whole text, identity, two words of the root key, interval.
_HEADER = 6
_TEXT_BYTES = 4 * (_WORDS - _HEADER)
_OTHER_STRUCTURE = (
    "`state` must have the structure that `tx` gives it, got {}; restore the checkpoint"
    " into the structure of tx.init(params)"
)
_MOST_DIFFERENCES = 8  # More of them say nothing new.
_LONGEST_VALUE = 64  # The settings of one transformation share about 240 bytes.
# In a word of its own: optax.inject_hyperparams makes an array of it, which is traced
# under jit, and the state has to be the same.
_INTERVALS = ("resample_every", "refresh_every")
_IN_A_WORD = "in a word"
# Settings that act through the leaf plans alone, which the identity covers.
_RULES = {field.name for field in dataclasses.fields(LeafRules)}
_PLANNING = {"rank", "side", "same_projection"} | _RULES


def make_spec(name: str, key: Any, identity: int = 0, **settings: Any) -> jax.Array:
    """Encodes the settings under which a state can be read.

    Args:
      name: the transformation's name.
      key: its root key data, uint32 of shape (2,).
      identity: checksum of what the sketches mean: their projection and the leaf plans.
      **settings: what else decides the meaning of the state; those that are None are
        left out. See :func:`describe` for how they are written.

    Returns:
      A uint32 vector of 64 words.
    """
    # So a setting that a later version adds, None by default, changes no old spec.
    given = {k: v for k, v in settings.items() if v is not None}
    interval = next((given[k] for k in _INTERVALS if k in given), 0)
    given |= {k: _IN_A_WORD for k in _INTERVALS if k in given}
    pairs = {"transformation": name, **{k: describe(v) for k, v in given.items()}}
    text = "; ".join(f"{k}: {v}" for k, v in pairs.items()).encode()
    padded = text[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    words = np.frombuffer(padded, "<u4").astype(np.uint32)
    # The checksum is of the full text, of which the vector may hold only the start.
    head = np.array([FORMAT, zlib.crc32(text), identity], np.uint32)
    every = jnp.asarray(interval, jnp.uint32)[None]
    return jnp.concatenate([head, key, every, words])


def spec_identity(spec: jax.Array) -> jax.Array:
    """The checksum in a spec of what the sketches mean, a uint32 scalar."""
    return spec[2]


def describe(value: Any) -> str:
    """Writes a setting as a text that is the same in every process and version.

    Of a dataclass only the fields that differ from their defaults are written, so that
    a field added later does not change the meaning of old states. Functions go by their
    qualified name, and long values by a checksum.

    Args:
      value: the setting.

    Returns:
      The text.
    """
    text = value if isinstance(value, str) else _text(value)
    if len(text) > _LONGEST_VALUE:
        text = f"checksum {zlib.crc32(text.encode()):08x}"
    return text


def _text(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        value = np.asarray(value).tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((x, getattr(value, x.name)) for x in dataclasses.fields(value))
        settings = [f"{x.name}={_text(own)}" for x, own in fields if own != x.default]
        return f"{type(value).__name__}({', '.join(settings)})"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    # 16 and 16.0 are one setting.
    return f"{value:.9g}" if isinstance(value, float | np.floating) else repr(value)


def verify_state(
    tx: optax.GradientTransformation, state: Any, params: Any = None
) -> None:
    """Raises if ``state`` was created with different settings from those of ``tx``.

    Call it after restoring a checkpoint: a state of the same shapes but of another
    seed, projection or interval would train on noise without an error. It compares
    host values and cannot be jitted. Settings that only change what is done with a
    state (learning rates, decays, estimators) may differ.

    Without ``params``, masks, ranks and dimension numbers that are functions are
    compared by their names. With ``params`` they are compared by what they decide for
    each leaf, and the shapes and dtypes of the full state are checked as well.

    Args:
      tx: the transformation that will use the state, in any chain or wrapper.
      state: its state, restored into the structure that ``tx.init`` gives.
      params: the parameters, or ShapeDtypeStructs of them; None to compare settings
        alone.

    Raises:
      TypeError: if a spec is no longer uint32, because the whole state was cast.
      ValueError: if settings, shapes or dtypes differ, naming both, or if a spec is
        missing or stacked.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.zeros((256, 256))}
      >>> state = fj.flora(1e-3, fj.Sketch(8)).init(params)
      >>> fj.verify_state(fj.flora(1e-3, fj.Sketch(8)), state, params)
    """
    tx = check.check_transformation("tx", tx, state)
    if params is None:
        expected, shapes = _specs_of_settings(tx, state), {}
    else:
        expected = _specs_of_init(tx, params)
        shapes = _shapes(abstract_state(tx.init, params))
    found, actual = _specs(state), _shapes(state)
    if shapes and shapes.keys() != actual.keys():
        different = sorted(shapes.keys() ^ actual.keys())[:4]
        raise ValueError(_OTHER_STRUCTURE.format(f"trees that differ at {different}"))
    if expected.keys() != found.keys():
        specs = f"specs at {sorted(found)}, expected at {sorted(expected)}"
        raise ValueError(_OTHER_STRUCTURE.format(specs))
    # Shapes only if all settings agree, or they would report one difference twice.
    differences = [
        f"{path or 'state'}: {line}"
        for path, spec in expected.items()
        for line in _differences(np.asarray(found[path]), spec, params is not None)
    ] or [
        f"{path}: {actual[path]} in the state, {shape} in tx"
        for path, shape in shapes.items()
        if actual[path] != shape
    ]
    if differences:
        raise ValueError(
            "`state` was created with different settings from `tx`, got "
            + "; ".join(differences[:_MOST_DIFFERENCES])
            + ". Use the settings of the run that saved it, or start a new state with"
            " tx.init"
        )


def _specs_of_settings(tx: Any, state: Any) -> dict[str, np.ndarray]:
    """Those of a fresh state made without the parameters."""
    fresh = []

    def init(params: Any) -> Any:
        # map_params calls this with a placeholder that every optax wrapper knows.
        fresh.append(tx.init(params))
        return fresh[0]

    try:
        jax.tree.map(lambda _: None, optax.tree.map_params(init, lambda x: x, state))
    except (TypeError, ValueError) as error:
        if not fresh:
            raise
        raise ValueError(_OTHER_STRUCTURE.format("another one")) from error
    return {path: np.asarray(spec) for path, spec in _specs(fresh[0]).items()}


def _specs_of_init(tx: Any, params: Any) -> dict[str, np.ndarray]:
    # Compiled, so that of the new state nothing but the specs is made; zeros without
    # strides stand for the parameters, which none of them reads.
    like = jax.tree.map(
        lambda x: np.broadcast_to(np.zeros((), jnp.result_type(x)), jnp.shape(x)),
        params,
    )
    specs = jax.jit(lambda params: _specs(tx.init(params)))
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return {path: np.asarray(spec) for path, spec in specs(like).items()}


def _shapes(tree: Any) -> dict[str, str]:
    """Dtype and shape of each array, by path."""
    return {
        "/".join(names): f"{jnp.result_type(x)}{list(jnp.shape(x))}"
        for names, x in named_arrays(tree)
        if not is_masked(x)
    }


def _specs(tree: Any) -> dict[str, Any]:
    """All fields named ``spec``, by the path of the state that they are part of."""
    return {
        "/".join(names[:-1]): leaf
        for names, leaf in named_arrays(tree)
        if names[-1:] == ("spec",)
    }


def _differences(found: np.ndarray, expected: np.ndarray, planned: bool) -> list[str]:
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
    # Nothing else is compared: the words of another format may mean anything.
    if found[0] != expected[0]:
        return [f"state format {found[0]} in the state, {expected[0]} in tx"]
    ours, theirs = _decode(expected), _decode(found)
    both = {name: (theirs.get(name), ours.get(name)) for name in {**ours, **theirs}}
    unequal = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    # Different rules that lead to the same plans are interchangeable.
    same_plans = planned and found[2] == expected[2]
    lines = [
        f"{name} {pair[0] or 'default'} in the state, {pair[1] or 'default'} in tx"
        for name, pair in unequal.items()
        if not (same_plans and name in _PLANNING)
    ]
    if planned and not same_plans and not lines:
        return [
            "the mask, ranks or dimension numbers give a different plan for at least"
            " one leaf"
        ]
    if found[1] != expected[1] and not unequal:  # Beyond the end of the vector.
        return [f"settings {theirs} in the state, {ours} in tx"]
    return lines


def _decode(spec: np.ndarray) -> dict[str, str]:
    text = spec[_HEADER:].astype("<u4").tobytes().rstrip(b"\0").decode(errors="replace")
    pairs = (item.partition(": ") for item in text.split("; "))
    settings = {name: value for name, _, value in pairs}
    every = str(spec[_HEADER - 1])
    settings = {k: every if v == _IN_A_WORD else v for k, v in settings.items()}
    return {**settings, "key data": str(spec[3:5].tolist())}
