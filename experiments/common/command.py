"""The command line of every question: parse, check, import what is heavy, run."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments.common import errors

# Top-level packages that the extra `experiments` installs, as they are imported.
_EXTRA = """
array_record babel flax grain importlib_resources matplotlib orbax requests rich
rouge_score sacrebleu safetensors sentencepiece tensorboardX tensorflow_datasets
tokenizers tyro
"""
EXTRA = frozenset(_EXTRA.split())


def main(
    configs: type | dict[str, tuple[str, Any]],
    module: str,
    prog: str,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    default: Any = None,
    resumable: bool = False,
) -> int:
    """Runs the command line of one question.

    A package of the extra that is not installed is one line. Any other import that
    fails is an error in the code, and raised.

    Args:
        configs: the dataclass of the settings, or by name a description and defaults,
            of which the first word on the command line chooses.
        module: see `execute`.
        prog: how the command is started.
        description: what `--help` says above the settings.
        arguments: in place of the command line's own.
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
        if error.name not in EXTRA:
            raise
        needs = f"experiments needs {error.name}: pip install -e '.[experiments]'"
        return _complain(needs, 2)


def question(config: type, description: str | None) -> Callable[..., int]:
    """Returns `main` for the question in whose folder the settings are.

    Args:
        config: the dataclass of the settings.
        description: see `main`.
    """
    name = config.__module__.rpartition(".")[0]
    names = f"{name}.run", f"python -m {name}"
    return functools.partial(main, config, *names, description)


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
        more = "; the same command continues from the last checkpoint" * resumable
        return _complain(f"interrupted{more}", 130)
    return 0


def _complain(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
