"""Orbax checkpoints of one training: parameters, optimizer state, number of updates.

A checkpoint counts from the moment that checksums of all its files lie beside them.
Orbax moves a checkpoint to its place when it is complete, but reads a folder with a
flipped byte or a lost file until something in it fails, or does not; the checksums are
compared before anything else looks at it.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
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

from experiments.common import processes
from experiments.common.errors import NO_ROOM, ConfigError, DiskError
from experiments.models.build import Params

_CHECKSUMS = "checksums.json"


class State(NamedTuple):
    """All that training carries from one update to the next."""

    params: Params
    opt_state: optax.OptState


def latest(folder: pathlib.Path) -> int | None:
    """Returns the update of the last finished checkpoint, None if there is none.

    Its files are not looked at: it may turn out to be damaged.
    """
    names = [file.parent.name for file in folder.glob(f"*/{_CHECKSUMS}")]
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
        self.folder, self._identity = folder, identity
        self._failed = False
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        with processes.first_goes_first():  # the others find it done
            _sort_out(folder)
        # The training step donates the buffers that a save in the background reads.
        # That is safe: Orbax copies them to the host before `save` returns, and where
        # they are in the host's memory already, it holds views of them, which keep jax
        # from reusing the buffers. A test counts on it.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True
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
            try:
                self._manager.close()
            except (OSError, ValueError) as error:
                # A write that fails has several errors, one for each of its threads;
                # the first of them was raised.
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
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            identity=ocp.args.JsonSave(self._identity),
        )
        with self._explained(update):
            needed = sum(x.nbytes for x in jax.tree.leaves(state))
            if shutil.disk_usage(self.folder).free < needed:  # It could not end.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._manager.save(update, args=args, force=True)
        self._pending = update, self._thread.submit(self._vouch, update)

    def _vouch(self, update: int) -> None:
        """Waits for the save and adds the checksums, whole or not at all."""
        self._manager.wait_until_finished()
        if processes.is_first():
            path = self.folder / str(update)
            temporary = path / f"{_CHECKSUMS}.tmp"
            temporary.write_text(json.dumps(contents(path), indent=1))
            temporary.replace(path / _CHECKSUMS)

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
            number, last = _errno(error), latest(self.folder)
            if number is None:
                raise
            self._failed = True
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
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template._asdict())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return update, State(**self._manager.restore(update, args=args)["state"])


def _errno(error: BaseException) -> int | None:
    """The number of the system's error, if an exception says that there is no room."""
    # TensorStore: ValueError("... No space left on device [os_error_code='28']").
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
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
    updates = sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())
    defects = {update: defect(folder / str(update)) for update in updates}
    last = max((x for x, found in defects.items() if found is None), default=None)
    if last is None and latest(folder) is not None:
        reasons = "; ".join(f"{update}: {found}" for update, found in defects.items())
        raise ConfigError(
            f"{folder} has no checkpoint that is whole ({reasons}); restore one from "
            "a copy, or give `--overwrite` to start again"
        )
    for update, found in defects.items():
        if found is None:
            continue
        path = folder / str(update)
        unfinished = not (path / _CHECKSUMS).exists()
        if unfinished and last is not None:
            # A common trace of kills, as large as a checkpoint: of a write, or of the
            # deletion of an old one.
            shutil.rmtree(path)
            fate = "it is removed"
        else:
            aside = path.with_name(f"{update}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            fate = f"what was there is now in {aside.name}"
        if last is None or update > last:
            used = (
                "training begins"
                if last is None
                else f"the one of update {last} is used"
            )
            _warn(f"{path} is not used: {found}; {used}, and {fate}")
        elif not unfinished:
            _warn(f"{path} is damaged: {found}; {fate}")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def contents(path: pathlib.Path) -> dict[str, list[Any]]:
    """Reads every file of a folder, but for the checksums.

    Returns:
        Size in bytes and SHA-256 of each file, by its path in the folder.
    """
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith(_CHECKSUMS):
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            name = file.relative_to(path).as_posix()
            found[name] = [file.stat().st_size, digest]
    return found


def defect(path: pathlib.Path) -> str | None:
    """Says what is wrong with a folder; None if it is as its checksums say."""
    file = path / _CHECKSUMS
    try:
        if not file.exists():
            return f"it has no {_CHECKSUMS}, so its write did not end"
        expected, found = json.loads(file.read_text()), contents(path)
    except ValueError:  # no JSON, or no UTF-8
        expected = None
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not isinstance(expected, dict):
        return f"{_CHECKSUMS} is damaged"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong to it"
        if expected[name] != found[name]:
            return f"{name} differs from what was written"
    return None
