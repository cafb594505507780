"""Where arrays lie: batches sharded over all devices, the rest replicated."""

import functools
import resource
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """Returns all devices of all processes along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def on_all() -> NamedSharding:
    """Returns the sharding of what is replicated on all devices."""
    return NamedSharding(mesh(), PartitionSpec())


def replicated(tree: Any) -> Any:
    """Puts a copy of every array, the same in all processes, on each device."""
    return jax.device_put(tree, on_all())


def split(batch: Any) -> Any:
    """Spreads a batch over the devices, along its first axis.

    A batch that does not divide evenly is replicated instead: nothing is gained
    then, but a small job runs on a large machine.

    Args:
        batch: NumPy arrays, (examples, ...). Every process has all of them and puts its
            own part on its devices: a batch is kilobytes, and in this way its order
            does not depend on the number of processes.
    """
    even = len(jax.tree.leaves(batch)[0]) % mesh().size == 0
    sharding = NamedSharding(mesh(), PartitionSpec("data" if even else None))

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, batch)


def peak_bytes() -> int:
    """Most memory in use so far: the first accelerator's, or else this process's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    # Kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
