"""One training in several processes, on JAX's own distributed runtime.

The same command is started once per process; all of them run the same program on the
same batches. A process whose environment has JAX_COORDINATOR_ADDRESS joins the others.
Folders are shared: the first process writes what people read, and all of them together
write checkpoints.
"""

import contextlib
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.common.errors import ConfigError

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_COUNT, _NUMBER = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# Long enough for the first process to prepare a large data set.
_PATIENCE_SECONDS = 3600

_waits = itertools.count()


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Makes this process one of several, before anything else is asked of JAX.

    JAX itself reads the coordinator's address, and finds the rest on Slurm, Open MPI,
    Kubernetes and Cloud TPU. Elsewhere two variables say it, which JAX does not read.

    Args:
        environment: has JAX_COORDINATOR_ADDRESS, the host and port of process 0, and
            perhaps JAX_NUM_PROCESSES and JAX_PROCESS_ID, which counts from 0.

    Raises:
        ConfigError: the variables make no sense, or are too few.
    """
    count, number = (_whole(environment, name) for name in (_COUNT, _NUMBER))
    try:
        jax.distributed.initialize(
            environment[COORDINATOR], num_processes=count, process_id=number
        )
    except (ValueError, IndexError) as error:  # IndexError: an address without a port.
        raise ConfigError(
            f"`{COORDINATOR}` is {environment[COORDINATOR]}, but JAX says: {error} "
            f"Give it as host:port, with {_COUNT} and {_NUMBER} (from 0) where no "
            "cluster that JAX knows sets them, or unset it to run one process"
        ) from error


def _whole(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is not None and not text.isdecimal():
        raise ConfigError(f"`{name}` must be a whole number, got {text!r}")
    return None if text is None else int(text)


def is_first() -> bool:
    """Whether this process writes what there is to be only once."""
    return jax.process_index() == 0


def wait() -> None:
    """Waits until all processes are here."""
    # Named processes meet at JAX's coordinator, which is patient. The default is a sum
    # over devices, whose transport gives up on a process that takes its time.
    ocp.multihost.sync_global_processes(
        f"experiments-{next(_waits)}",
        timeout=_PATIENCE_SECONDS,
        processes=set(range(jax.process_count())),
    )


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Lets the first process through a block before the others.

    They find on the disk what it has made there. If it fails they are let in as well,
    and fail on the same ground.
    """
    if not is_first():
        wait()
    try:
        yield
    finally:
        if is_first():
            wait()


def check_same(what: str, value: object) -> None:
    """Refuses to train if the processes differ in something.

    Args:
        what: its name, for the message.
        value: this process's; compared as text.

    Raises:
        ConfigError: in all processes, if one has another value.
    """
    checksum = np.uint32(zlib.crc32(str(value).encode()))
    found = np.ravel(multihost_utils.process_allgather(checksum))
    others = np.flatnonzero(found != found[0])
    if len(others):
        raise ConfigError(
            f"the processes do not agree on {what}: it differs from process 0's in "
            f"{', '.join(map(str, others))}; give all the same command, and folders "
            "that they share"
        )
