"""Ahead-of-time compilation for chips that are not attached, and their peak rates."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from experiments.common.errors import ConfigError

# What the compiler wants to know of an H100 SXM, as published.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip that a step can be compiled for.

    Attributes:
        topology: its name for the TPU's compiler; a description for the GPU's.
        platform: "tpu" or "cuda".
        bandwidth: of its main memory, bytes a second.
        flops: of matrix products a second, by their precision: "bfloat16" of operands
            in bfloat16, else XLA's for operands in float32, or "3 of TF32" parts.
    """

    topology: str
    platform: str
    bandwidth: float
    flops: Mapping[str, float]

    def seconds(self, nbytes: float, flops: float, precision: str) -> float:
        """Returns the least time of a kernel: that of its memory or of its products."""
        return max(nbytes / self.bandwidth, flops and flops / self.flops[precision])


def _tpu(topology: str, bandwidth: float, flops: float) -> Chip:
    # Float32 in one, three or six products of bfloat16 parts.
    passes = {"bfloat16": 1, "default": 1, "high": 3, "highest": 6}
    return Chip(topology, "tpu", bandwidth, {k: flops / n for k, n in passes.items()})


# As published: dense products, without sparsity. The H100 multiplies float32 as TF32
# unless "highest" is asked for, which leaves its tensor cores.
_TF32 = 494e12
CHIPS = {
    "v5e": _tpu("v5e:2x2", 819e9, 197e12),
    "v6e": _tpu("v6e:2x2", 1640e9, 918e12),
    "h100": Chip(
        _H100,
        "cuda",
        3352e9,
        {
            "bfloat16": 989e12,
            "default": _TF32,
            "high": _TF32,
            "3 of TF32": _TF32 / 3,
            "highest": 67e12,
        },
    ),
}


def topology(platform: str, name: str) -> Any:
    """Returns a topology to compile for without the device.

    Args:
        platform: "tpu" or "cuda".
        name: as in `Chip.topology`; also pods, such as "v5e:8x8".

    Raises:
        ConfigError: the compiler is not installed.
    """
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    if platform == "cuda":
        if not installed("jax_plugins.xla_cuda13"):
            raise ConfigError(
                "the GPU's compiler is missing: in an environment of its own, pip"
                " install -e '.[experiments]' 'jax-cuda13-plugin[with-cuda]'"
                f" jax-cuda13-pjrt, of version {jax.__version__}"
            )
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        _initialize_cuda()
        return topologies.get_topology_desc(
            "", "cuda", target_config=name, topology="1x1x1"
        )
    if not installed("libtpu"):
        raise ConfigError(
            "the TPU's compiler is missing: pip install -e '.[tpu-compiler]'"
        )
    # Without these the compiler looks for an attached TPU and its neighbors.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    return topologies.get_topology_desc(name, "tpu")


def placed_on(chip: Chip, shapes: Any) -> Any:
    """Returns arguments to lower a function for one device of a chip.

    Args:
        chip: what it is compiled for.
        shapes: a tree of arrays, or of what has their shape and dtype.

    Raises:
        ConfigError: the chip's compiler is not installed.
    """
    import jax

    device = topology(chip.platform, chip.topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
    )


def compile_step(
    tx: Any, shapes: Any, shardings: Any, states: Any, one_call: bool = True
) -> tuple[Any, float]:
    """Compiles update and application, with parameters and state donated.

    Args:
        tx: the transformation.
        shapes: of the parameters.
        shardings: of these, on devices of `topology`.
        states: shardings of the state.
        one_call: by `fj.update_and_apply`, or by optax's two calls.

    Returns:
        The compiled step, and the processor seconds that lowering and compiling took.
    """
    import jax
    import optax

    import flora_jax as fj

    def placed(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda x, y: x.update(sharding=y), tree, where)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        if one_call:
            return fj.update_and_apply(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = placed(shapes, shardings)
    state = placed(jax.eval_shape(tx.init, shapes), states)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(shardings, states))
    started = time.process_time()
    compiled = jitted.lower(params, state, params).compile()
    return compiled, round(time.process_time() - started, 1)


def compile_on_one(
    chip: Chip, tx: Any, shapes: Any, one_call: bool = True
) -> tuple[Any, float]:
    """Compiles update and application for one device of a chip, see `compile_step`."""
    import jax

    device = topology(chip.platform, chip.topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    shardings, states = (
        jax.tree.map(lambda _: place, tree)
        for tree in (shapes, jax.eval_shape(tx.init, shapes))
    )
    return compile_step(tx, shapes, shardings, states, one_call)


# What a TPU's compiler says of a program that does not fit.
_REFUSED = re.compile(r"Ran out of memory.*\(([\d.]+)G\) exceeds")


def refused_bytes(error: Exception) -> int | None:
    """Returns the bytes for want of which a TPU's compiler refuses a program.

    Args:
        error: of `compile`.

    Returns:
        All that the program would take; None if something else is wrong.
    """
    found = _REFUSED.search(str(error))
    return None if found is None else round(float(found[1]) * 2**30)


def installed(module: str) -> bool:
    """Returns whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Not even its package.
        return False


def _initialize_cuda() -> None:
    import jax
    from jax_plugins import xla_cuda13  # pyright: ignore[reportMissingImports]

    try:
        xla_cuda13.initialize()
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def versions(platform: str) -> dict[str, str]:
    """Returns the version of a platform's compiler, by its package."""
    package = {"tpu": "libtpu", "cuda": "jax-cuda13-pjrt"}[platform]
    return {package: importlib.metadata.version(package)}
