"""Orbax checkpoints of one training: parameters, optimizer state, number of updates."""

import pathlib
from typing import Any, NamedTuple

import jax
import optax
import orbax.checkpoint as ocp

from experiments.config import ConfigError
from experiments.models.build import Params


class State(NamedTuple):
    """All that training carries from one update to the next."""

    params: Params
    opt_state: optax.OptState


def latest(folder: pathlib.Path) -> int | None:
    """Returns the update of the last complete checkpoint, None if there is none."""
    if not folder.is_dir():
        return None
    with ocp.CheckpointManager(folder.absolute()) as manager:
        return manager.latest_step()


class Checkpoints:
    """Writes and reads the checkpoints of one training; the last one is kept."""

    def __init__(self, folder: pathlib.Path, identity: dict[str, Any]):
        """Opens the folder.

        Args:
            folder: where the checkpoints lie.
            identity: the settings, by flag, that a checkpoint has to agree with.
        """
        self.folder = folder
        self._identity = identity
        # The training step donates its buffers: a save in the background could read
        # them while the next step writes.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def close(self) -> None:
        """Closes the folder."""
        self._manager.close()

    def latest(self) -> int | None:
        """Returns the update of the last checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, update: int, state: State) -> None:
        """Writes the state after `update`."""
        self._manager.save(
            update,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                identity=ocp.args.JsonSave(self._identity),
            ),
            force=True,
        )

    def restore(self, template: State) -> tuple[int, State]:
        """Reads the last checkpoint.

        Args:
            template: a state of the same shapes, for example a freshly made one.

        Returns:
            The number of updates behind it, and the state.

        Raises:
            ConfigError: the checkpoint was made with other settings.
        """
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
