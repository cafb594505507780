"""Orbax checkpoints of one training: parameters, optimizer state, number of updates.

A checkpoint counts from the moment that checksums of all its files lie beside them.
Orbax moves a checkpoint to its place when it is complete, but reads a folder with a
flipped byte or a lost file until something in it fails, or does not; the checksums are
compared before anything else looks at it.
"""

import concurrent.futures
import contextlib
import errno
import logging
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax
import orbax.checkpoint as ocp

from experiments.common import checksums, processes
from experiments.common.errors import NO_ROOM, ConfigError, DiskError
from experiments.models.build import Params

_KEPT = 2


class State(NamedTuple):
    """All that training carries from one update to the next."""

    params: Params
    opt_state: optax.OptState


def latest(folder: pathlib.Path) -> int | None:
    """Returns the update of the last finished checkpoint, None if there is none.

    Its files are not looked at: it may turn out to be damaged.
    """
    names = [file.parent.name for file in folder.glob(f"*/{checksums.NAME}")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


class Checkpoints:
    """Writes and reads the checkpoints of one training; the last two are kept.

    They are written while training continues. A process that is killed meanwhile leaves
    the earlier ones as they were.
    """

    def __init__(self, folder: pathlib.Path, identity: dict[str, Any]):
        """Opens the folder, and moves out of the way what cannot be trusted in it.

        Args:
            folder: where the checkpoints lie.
            identity: the settings, by flag, that a checkpoint has to agree with.

        Raises:
            ConfigError: there are checkpoints, and each of them is damaged.
        """
        self.folder = folder
        self._identity = identity
        self._failed = False
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        with processes.first_goes_first():  # the others find it done
            _sort_out(folder)
        # The training step donates the buffers that a save in the background reads.
        # That is safe: Orbax copies them to the host before `save` returns, and where
        # they are in the host's memory already, it holds views of them, which keep jax
        # from reusing the buffers. A test counts on it.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checksums")
        logging.getLogger("absl").addFilter(_is_no_disk_error)

    def close(self) -> None:
        """Waits for the last save and closes the folder.

        Raises:
            DiskError: the last save failed.
        """
        try:
            self._finish()
        finally:
            self._thread.shutdown()
            self._close_manager()

    def _close_manager(self) -> None:
        try:
            self._manager.close()
        except (OSError, ValueError) as error:
            # A write that fails has several errors, one for each of its threads; the
            # first of them was raised.
            if not self._failed or _errno(error) is None:
                raise

    def latest(self) -> int | None:
        """Returns the update of the last checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, update: int, state: State) -> None:
        """Starts to write the state after `update`; its buffers may be donated next.

        Raises:
            DiskError: this save or the one before it failed.
        """
        self._finish()
        with self._explained(update):
            self._check_room(state)
            self._manager.save(
                update,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    identity=ocp.args.JsonSave(self._identity),
                ),
                force=True,
            )
        self._pending = update, self._thread.submit(self._vouch, update)

    def _check_room(self, state: State) -> None:
        """Stops before a write that cannot end."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        if shutil.disk_usage(self.folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _vouch(self, update: int) -> None:
        """Waits for the save and adds the checksums."""
        self._manager.wait_until_finished()
        if processes.is_first():
            checksums.write(self.folder / str(update))

    def _finish(self) -> None:
        """Waits for the save in the background; its error is raised here."""
        if self._pending is None:
            return
        update, done = self._pending
        self._pending = None
        with self._explained(update):
            # Orbax raises an error once in each thread that waits: here too, that
            # `close` will not raise it again.
            self._manager.wait_until_finished()
            done.result()

    @contextlib.contextmanager
    def _explained(self, update: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            number = _errno(error)
            if number is None:
                raise
            self._failed = True
            last = latest(self.folder)
            left = "there is no earlier one"
            if last is not None:
                left = f"the one of update {last} is whole, and resuming starts there"
            raise DiskError(
                f"{self.folder}: the checkpoint of update {update} could not be "
                f"written: {os.strerror(number)}; make room or give another "
                f"`--output-dir`; {left}"
            ) from error

    def restore(self, template: State) -> tuple[int, State]:
        """Reads the last checkpoint.

        Args:
            template: a state of the same shapes, for example a freshly made one.

        Returns:
            The number of updates behind it, and the state.

        Raises:
            ConfigError: the checkpoint was made with other settings.
        """
        self._finish()
        update = self._manager.latest_step()
        self._check_identity(update)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template._asdict())
        restored = self._manager.restore(
            update,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
        )
        return update, State(**restored["state"])

    def _check_identity(self, update: int) -> None:
        args = ocp.args.Composite(identity=ocp.args.JsonRestore())
        saved = self._manager.restore(update, args=args)["identity"]
        for name in sorted(saved.keys() | self._identity.keys()):
            old, new = saved.get(name), self._identity.get(name)
            if old != new:
                raise ConfigError(
                    f"{self.folder} holds a checkpoint made with {name} {old}, but "
                    f"this run has {name} {new}; give the same, another "
                    "`--output-dir`, or `--overwrite` to start again"
                )


def _errno(error: BaseException) -> int | None:
    """The number of the system's error, if an exception says that there is no room."""
    if isinstance(error, OSError):
        number = error.errno
    else:
        # TensorStore: ValueError("... No space left on device [os_error_code='28']").
        found = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(found[1]) if found else None
    return number if number in NO_ROOM else None


def _is_no_disk_error(record: logging.LogRecord) -> bool:
    """Keeps out of the log, with stack traces, what is raised and explained as well."""
    error = record.exc_info[1] if record.exc_info else None
    return _errno(error or ValueError(record.getMessage())) is None


def _sort_out(folder: pathlib.Path) -> None:
    """Leaves only whole checkpoints under their names.

    Raises:
        ConfigError: there are checkpoints, and each of them is damaged.
    """
    paths = [path for path in folder.glob("*") if path.name.isdecimal()]
    defects = {path: checksums.defect(path) for path in sorted(paths, key=_update)}
    whole = [path for path, defect in defects.items() if defect is None]
    if not whole and latest(folder) is not None:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in defects.items())
        raise ConfigError(
            f"{folder} has no checkpoint that is whole ({reasons}); restore one from "
            "a copy, or give `--overwrite` to start again"
        )
    last = _update(whole[-1]) if whole else 0
    for path, defect in defects.items():
        if defect is None:
            continue
        newer = _update(path) > last
        unfinished = not (path / checksums.NAME).exists()
        if unfinished and (whole or not newer):
            # A common trace of kills, as large as a checkpoint: of a write, or of the
            # deletion of an old one.
            shutil.rmtree(path)
            fate = "it is removed"
        else:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            fate = f"what was there is now in {aside.name}"
        if newer:
            used = f"the one of update {last} is used" if whole else "training begins"
            _warn(f"{path} is not used: {defect}; {used}, and {fate}")
        elif not unfinished:
            _warn(f"{path} is damaged: {defect}; {fate}")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _update(path: pathlib.Path) -> int:
    return int(path.name)
