"""The command line: what it refuses, how it says so, and its progress bars."""

import dataclasses
import io

import pytest
from rich.console import Console

from experiments.__main__ import main
from experiments.common.display import Display
from experiments.common.errors import ConfigError
from experiments.main_job.config import METHODS, Config


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        if field.name not in ("model", "learning_rates"):
            assert "--" + field.name.replace("_", "-") in text
    assert "--model.width" in text
    assert "--learning-rates.flora-momentum" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods galore", "`--methods` got 'galore', which is no method here; choo"),
        ("--methods", "`--methods` names no training; choose from adafactor_momentum"),
        (
            "--methods flora_momentum flora_momentum",
            "`--methods` names a training twice",
        ),
        (
            "--micro-batches 5",
            "`--micro-batches` must divide `--batch-size`, got 5 and 12; use one of 1, "
            "2, 3, 4, 6, 12",
        ),
        ("--rank 0", "`--rank` must be at least 1, got 0"),
        ("--rank -2", "`--rank` must be at least 1, got -2"),
        (
            "--rank 256",
            "`--rank` must be below `--model.width` (256) to compress anyth",
        ),
        ("--updates 0", "`--updates` must be at least 1, got 0"),
        ("--resample-every 0", "`--resample-every` must be at least 1, got 0"),
        ("--eval-every 0", "`--eval-every` must be at least 1, got 0"),
        ("--momentum 1", "`--momentum` must be in [0, 1), got 1.0; 0.9 is usual"),
        ("--reading nesterov", "`--reading` must be one of paper, interpolated, re"),
        ("--reading residual --projection Gaussian", "`--reading residual` wants a p"),
        (
            "--sketched-gradients --methods flora_momentum",
            "`--sketched-gradients` is for flora_accumulation, got `--methods` flora_",
        ),
        ("--projection gauss", "`--projection` must be one of Gaussian, Rademacher, "),
        ("--warmup-fraction 1", "`--warmup-fraction` must be in [0, 1), got 1.0; 0.1 "),
        ("--seed -1", "`--seed` must not be negative, got -1"),
        ("--learning-rate nan", "`--learning-rate` must be positive and finite, got n"),
        (
            "--learning-rates.flora-momentum 0",
            "`--learning-rates.flora-momentum` must be positive and finite, got 0.0; ",
        ),
        (
            "--stop-after 0",
            "`--stop-after` must be between 1 and `--updates` (200), go",
        ),
        ("--stop-after 201", "`--stop-after` must be between 1 and `--updates` (200)"),
        ("--resume --overwrite", "`--resume` continues a run and `--overwrite` delete"),
        ("--model.layers 0", "`--model.layers` must be at least 1, got 0"),
        (
            "--model.heads 3",
            "`--model.heads` must divide `--model.width`, got 3 and 256",
        ),
        ("--model.vocab-size 256", "`--model.vocab-size` must be at least 257 (the by"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert main(arguments.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_resume_without_a_checkpoint(tmp_path, capsys):
    assert main(["--resume", "--output-dir", str(tmp_path / "none")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: `--resume` found no checkpoint in ")
    assert errors.count("\n") == 1


def test_settings_reach_the_run(monkeypatch):
    seen = []
    monkeypatch.setattr("experiments.main_job.run.run", seen.append)
    arguments = "--updates 8 --methods flora_momentum --learning-rate 0.5 --resume"
    assert main([*arguments.split(), "--model.width", "512"]) == 0
    (config,) = seen
    assert (config.updates, config.methods) == (8, ("flora_momentum",))
    assert (config.model.width, config.resume) == (512, True)
    assert config.peak_learning_rate("flora_momentum") == 0.5


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("why"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_failing_run_has_a_status(monkeypatch, capsys, error, status):
    def fail(config):
        raise error

    monkeypatch.setattr("experiments.main_job.run.run", fail)
    assert main([]) == status
    assert capsys.readouterr().err.startswith("error: ")


def test_identity_is_what_decides_the_numbers():
    config = Config()
    same = dataclasses.replace(config, resume=True, stop_after=5, methods=METHODS[:1])
    assert same.identity("flora_momentum") == config.identity("flora_momentum")
    other = dataclasses.replace(config, learning_rate=0.5)
    assert other.identity("flora_momentum")["--learning-rate"] == 0.5
    assert config.identity("flora_momentum")["--model.width"] == 256


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_and_speed(terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=110)
    row = {"update": 3, "loss": 5.4321, "tokens_per_second": 6789.0}
    row["step_bytes"] = 1.5 * 2**30
    with Display(console) as display:
        bar = display.add("FLORA momentum", total=5, done=2)
        bar.show(row)
        bar.show(row | {"validation_loss": 5.6})
    for part in ("FLORA momentum", "3/5", "loss 5.432", "6,789 tokens/s", "1.50 GiB"):
        assert part in output.getvalue()
    assert ("validation 5.600" in output.getvalue()) != terminal
