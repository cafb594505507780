"""The command line of every question: parse, check, import what is heavy, run."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from experiments.common import errors

# Top-level packages that the extra `experiments` installs, as they are imported.
EXTRA = frozenset(
    {
        "array_record",
        "babel",
        "equinox",
        "flax",
        "grain",
        "importlib_resources",
        "matplotlib",
        "orbax",
        "requests",
        "rich",
        "rouge_score",
        "sacrebleu",
        "safetensors",
        "sentencepiece",
        "tensorboardX",
        "tensorflow_datasets",
        "tokenizers",
        "tyro",
    }
)


def main(
    configs: type | dict[str, tuple[str, Any]],
    arguments: Sequence[str] | None = None,
    *,
    module: str,
    prog: str,
    description: str | None,
    default: Any = None,
    resumable: bool = False,
) -> int:
    """Runs the command line of one question.

    A package of the extra that is not installed is one line. Any other import that
    fails is an error in the code, and raised.

    Args:
        configs: the dataclass of the settings, or by name a description and defaults,
            of which the first word on the command line chooses.
        arguments: in place of the command line's own.
        module: see `execute`.
        prog: how the command is started.
        description: what `--help` says above the settings.
        default: settings in place of the defaults of a dataclass.
        resumable: see `execute`.

    Returns:
        The exit status, see `execute`.
    """
    try:
        import tyro

        parse: Callable[..., Any] = functools.partial(tyro.cli, default=default)
        if isinstance(configs, dict):
            parse = tyro.extras.overridable_config_cli
        options = {"prog": prog, "description": description, "args": arguments}
        config = parse(configs, **options, config=(tyro.conf.FlagCreatePairsOff,))
        return execute(config, module, resumable=resumable)
    except ModuleNotFoundError as error:
        if not _of_the_extra(error):
            raise
        return _complain_missing(error)


def question(config: type, description: str | None) -> Callable[..., int]:
    """Returns `main` for the question in whose folder the settings are.

    Args:
        config: the dataclass of the settings.
        description: see `main`.
    """
    folder = config.__module__.rpartition(".")[0]
    names = {"module": f"{folder}.run", "prog": f"python -m {folder}"}
    return functools.partial(main, config, description=description, **names)


def execute(config: Any, module: str, *, resumable: bool = False) -> int:
    """Checks the settings, then imports what is heavy and runs it.

    A refused command line answers at once, in one line.

    Args:
        config: the settings, with a method `validate`.
        module: has a function `run` of them.
        resumable: the job makes checkpoints to continue from, and can be run by several
            processes; this one joins the others if JAX_COORDINATOR_ADDRESS is set.

    Returns:
        The exit status: 0, 1 if a run diverged or the disk is full, 2 for settings that
        make no sense or a missing package, 130 if it was interrupted.
    """
    try:
        config.validate()
        if resumable and "JAX_COORDINATOR_ADDRESS" in os.environ:
            processes = importlib.import_module("experiments.common.processes")
            processes.join()
            processes.check_same("the command line", config)
        importlib.import_module(module).run(config)
    except errors.ConfigError as error:
        return _complain(error, 2)
    except (errors.DiskError, errors.NonFiniteLossError) as error:
        return _complain(error, 1)
    except OSError as error:  # of metrics or a report; those of checkpoints say more
        if error.errno not in errors.NO_ROOM:
            raise
        return _complain(f"{error}; make room, then start again", 1)
    except KeyboardInterrupt:
        if not resumable:
            return _complain("interrupted", 130)
        how = "the same command continues from the last checkpoint"
        return _complain(f"interrupted; {how}", 130)
    return 0


def explain_missing_package(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A `sys.excepthook`: one line for a package of the extra that is not installed."""
    if isinstance(error, ModuleNotFoundError) and _of_the_extra(error):
        sys.exit(_complain_missing(error))
    sys.__excepthook__(kind, error, trace)


def _of_the_extra(error: ModuleNotFoundError) -> bool:
    # The name may be that of a submodule, such as orbax.checkpoint.
    return (error.name or "").partition(".")[0] in EXTRA


def _complain_missing(error: ModuleNotFoundError) -> int:
    needs = f"experiments needs {error.name}: pip install -e '.[experiments]'"
    return _complain(needs, 2)


def _complain(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
