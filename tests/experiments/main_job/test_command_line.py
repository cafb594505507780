"""The command line: what it refuses, how it says so, and its progress bars."""

import dataclasses
import io

import pytest
from rich.console import Console

from experiments.__main__ import main
from experiments.common.config import Run
from experiments.common.display import Bar, bars
from experiments.common.errors import ConfigError
from experiments.common.methods import MAIN
from experiments.main_job.config import Config
from tests.experiments.commands import assert_refused


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        if field.name not in ("model", "lora_tune_rest"):
            assert "--" + field.name.replace("_", "-") in text
    assert "--model.width" in text
    assert "--no-lora-tune-rest" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods", "`--methods` must name at least one, each once, got ''"),
        (
            "--methods flora_momentum flora_momentum",
            "`--methods` must name at least one, each once, got 'flora_momentum flora_",
        ),
        (
            "--micro-batches 3",
            "`--micro-batches` must divide `--batch-size` (4) for full_accumulation",
        ),
        ("--ranks 0", "`--ranks` must be at least 1, got 0"),
        ("--ranks 8 -2", "`--ranks` must be at least 1, got -2"),
        (
            "--ranks 256",
            "`--ranks` must be below `--model.width` (256) to compress anyth",
        ),
        ("--updates 0", "`--updates` must be at least 1, got 0"),
        ("--resample-every 0", "`--resample-every` must be at least 1, got 0"),
        ("--eval-every 0", "`--eval-every` must be at least 1, got 0"),
        ("--momentum 1", "`--momentum` must be in [0, 1), got 1.0"),
        (
            "--estimator residual --projection Gaussian",
            "`--estimator residual` needs a projection with orthogonal rows, got `--pr",
        ),
        ("--optimizer adam", "`--methods` got full_momentum, but `--optimizer adam`"),
        ("--warmup-fraction 1", "`--warmup-fraction` must be in [0, 1), got 1.0"),
        ("--seed -1", "`--seed` must be non-negative, got -1"),
        ("--learning-rate nan", "`--learning-rate` must be positive and finite, got n"),
        (
            "--stop-after 0",
            "`--stop-after` must be between 1 and `--updates` (100), go",
        ),
        ("--stop-after 101", "`--stop-after` must be between 1 and `--updates` (100)"),
        ("--model.layers 0", "`--model.layers` must be at least 1, got 0"),
        (
            "--model.heads 3",
            "`--model.heads` must divide `--model.width`, got 3 and 256",
        ),
        ("--model.vocab-size 256", "`--model.vocab-size` must be at least 257 (the by"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert_refused(main, arguments.split(), message, capsys)


@pytest.mark.parametrize(
    "arguments", ["--methods galore", "--estimator nestrov", "--projection gauss"]
)
def test_unknown_names_are_refused_with_the_known_ones(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection": "gauss"}, "`--projection` must be one of CountSketch, Gaussi"),
        ({"methods": ("galore",)}, "`--methods` must be one of none, full_accumulat"),
    ],
)
def test_a_program_is_refused_the_same(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(Config(), **changes).validate()


def test_settings_reach_the_run(monkeypatch):
    seen = []
    monkeypatch.setattr("experiments.main_job.run.run", seen.append)
    arguments = "--updates 8 --methods flora_momentum --learning-rate 0.5 --overwrite"
    assert main([*arguments.split(), "--model.width", "512"]) == 0
    (config,) = seen
    assert (config.updates, config.methods) == (8, ("flora_momentum",))
    assert (config.model.width, config.overwrite) == (512, True)
    assert config.peak("flora_momentum") == 0.5
    assert config.peak("lora_momentum") == 1.5


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("why"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_failing_run_has_a_status(monkeypatch, capsys, error, status):
    def fail(config):
        raise error

    monkeypatch.setattr("experiments.main_job.run.run", fail)
    assert main([]) == status
    assert capsys.readouterr().err.startswith("error: ")


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    """Of the extra; what else cannot be imported is an error in the code."""

    missing = ("tensorboardX", "orbax.checkpoint")
    names = iter((*missing, "flora_jax", None))

    def fail(config):
        name = next(names)
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("experiments.main_job.run.run", fail)
    for name in missing:
        assert main([]) == 2
        assert capsys.readouterr().err == (
            f"error: experiments needs {name}: pip install -e '.[experiments]'\n"
        )
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="No module named"):
            main([])


def test_identity_is_what_decides_the_numbers():
    run = Run(Config(), "flora_momentum", 8)
    same = dataclasses.replace(
        run.config, overwrite=True, stop_after=5, methods=MAIN[:1]
    )
    assert dataclasses.replace(run, config=same).identity == run.identity
    other = dataclasses.replace(run.config, learning_rate=0.5)
    identity = dataclasses.replace(run, config=other).identity
    assert identity["--learning-rate"] == 0.5
    assert run.identity["--model.width"] == 256


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_and_speed(terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=110)
    row = {"update": 3, "loss": 5.4321, "tokens_per_second": 6789.0}
    row["step_bytes"] = 1.5 * 2**30
    with bars(console) as progress:
        bar = Bar(progress, "FLORA momentum", total=5, done=2)
        bar.say("compiling")
        assert terminal or "compiling" in output.getvalue()
        bar.show({"update": 0, "validation_loss": 8.3})
        assert terminal or "0/5  validation 8.300" in output.getvalue()
        bar.show(row)
        assert terminal or "loss" not in output.getvalue()
        bar.show(row | {"validation_loss": 5.6})
    for part in ("FLORA momentum", "3/5", "loss 5.432", "6,789 tokens/s", "1.50 GiB"):
        assert part in output.getvalue()
    assert "validation 5.600" in output.getvalue()
