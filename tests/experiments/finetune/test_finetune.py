"""Tiny fine-tunings: all methods on both offline data sets, and a kill."""

import dataclasses
import functools
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.common import checkpoints, records
from experiments.common.errors import ConfigError
from experiments.common.loop import training_step
from experiments.common.methods import FINETUNE, METHODS
from experiments.common.problem import build
from experiments.data import corpus
from experiments.data.registry import DATASETS
from experiments.data.vocabulary import Chat
from experiments.finetune import prepare as prepare_module
from experiments.finetune.__main__ import main
from experiments.finetune.config import PRESETS, Config
from experiments.finetune.prepare import prepare
from experiments.finetune.run import run
from experiments.models import pretrained
from experiments.models.build import create, mean_loss
from experiments.models.config import LlamaConfig, T5Config
from experiments.models.hugging_face import load, read_config, save
from experiments.sweep.tasks import Task
from tests.common import process_environment
from tests.experiments.commands import assert_refused

# One worker runs them all, and makes data and programs once.
pytestmark = pytest.mark.xdist_group("finetune")

UPDATES = 6
# One of each kind of buffer, in the order of reports; the rest in the slow tier.
BUFFERS = (
    "full_accumulation",
    "flora_accumulation",
    "sketched_accumulation",
    "lora_accumulation",
    "flora_momentum",
)
TINY = Config(
    dataset="phrases",
    methods=FINETUNE,
    ranks=(8,),
    updates=UPDATES,
    batch_size=16,
    micro_batches=2,
    vocab_size=400,
    source_length=12,
    target_length=12,
    eval_every=4,
    eval_examples=20,
    decode_examples=12,
    checkpoint_every=2,
    samples=2,
    dropout=0.1,
)


@functools.cache
def few_pairs(name, data_dir):
    """The beginnings of a data set's splits, loaded once."""
    splits = DATASETS[name].load(data_dir)
    return {split: pairs[:800] for split, pairs in splits.items()}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """One layer, and few pairs."""
    size = T5Config(layers=1, decoder_layers=1)
    monkeypatch.setitem(prepare_module._TINY, "t5-tiny", size)
    small = {
        name: dataclasses.replace(
            dataset, load=lambda folder, download, name=name: few_pairs(name, folder)
        )
        for name, dataset in DATASETS.items()
    }
    monkeypatch.setattr(prepare_module, "DATASETS", small)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.full
@pytest.mark.parametrize(
    ("dataset", "model", "methods", "options", "metrics"),
    [
        ("phrases", "t5-tiny", BUFFERS, {}, {"exact_match", "bleu", "chrf"}),
        pytest.param(
            *("phrases", "t5-tiny", FINETUNE, {}, {"exact_match", "bleu", "chrf"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "docstrings",
            "gpt2-tiny",
            ("flora_accumulation", "lora_accumulation"),
            {"scan": True, "remat": True, "dtype": "bfloat16", "beams": 2},
            {"rouge1", "rouge2", "rougeL"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_methods_train_and_are_evaluated(
    dataset, model, methods, options, metrics, data_dir, tmp_path, capsys
):
    config = dataclasses.replace(
        TINY,
        dataset=dataset,
        model=model,
        methods=methods,
        data_dir=data_dir,
        output_dir=tmp_path,
        **options,
    )
    rows = run(config)
    plain = dataclasses.replace(config, scan=False)
    structure = jax.tree.structure(prepare(plain).params)
    shown = capsys.readouterr().out
    assert [row["method"] for row in rows] == list(methods)
    for row in rows:
        assert metrics <= row.keys()
        assert all(0 <= row[name] <= 100 for name in metrics)
        name = row["method"] + ("-r8" if row["rank"] else "")
        lines = records.read_rows(tmp_path / name / "metrics.jsonl")
        assert [line["update"] for line in lines] == list(range(UPDATES + 1))
        assert lines[-1]["validation_loss"] < lines[0]["validation_loss"]
        assert lines[-1]["process_peak_bytes"] > 2**20
        assert lines[-1]["step_bytes"] == row["step_peak_bytes"] > row["state_bytes"]
        events = list((tmp_path / name / "tensorboard").glob("events.*"))
        assert events[0].stat().st_size > 100
        model_dir = tmp_path / name / "model"
        loaded = load(model_dir, read_config(model_dir))
        assert jax.tree.structure(loaded) == structure
        samples = (tmp_path / name / "samples.txt").read_text()
        assert samples.count("prediction: ") == 2
        # Long lines are folded on the screen.
        assert samples.splitlines()[0][:60] in shown
    sizes = {row["method"]: row for row in rows}
    flora, lora = sizes["flora_accumulation"], sizes["lora_accumulation"]
    assert lora["trained_bytes"] < flora["trained_bytes"]
    if "full_accumulation" in sizes:
        assert flora["state_bytes"] < sizes["full_accumulation"]["state_bytes"]
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert (tmp_path / "report.md").read_text().count("\n") == 2 + len(methods)


@pytest.mark.full
def test_same_command_goes_on(data_dir, tmp_path):
    config = dataclasses.replace(
        TINY, methods=("flora_momentum",), data_dir=data_dir, output_dir=tmp_path
    )
    assert run(dataclasses.replace(config, stop_after=3)) == []
    (row,) = run(config)
    assert run(config) == [row]  # nothing is left to do
    with pytest.raises(ConfigError, match="made with --seed 0, but this run has --see"):
        run(dataclasses.replace(config, seed=1))
    (other,) = run(dataclasses.replace(config, seed=1, overwrite=True))
    assert other["validation_loss"] != row["validation_loss"]


def test_a_checkpoint_without_its_tokenizer(tmp_path):
    config = dataclasses.replace(TINY, checkpoint=tmp_path)
    with pytest.raises(ConfigError, match=r"has no spiece.model; fetch it .* or give"):
        prepare_module._vocabulary(config, prepare_module._TINY[config.model], {})


def test_a_pretrained_model_is_asked_in_its_own_way(data_dir, tmp_path, monkeypatch):
    words = [text for pair in few_pairs("phrases", data_dir)["train"] for text in pair]
    tokenizer = corpus.train_tokenizer(words, 400)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    vocabulary = Chat(tokenizer, "<|im_start|>…")
    before, after, _ = vocabulary.frame()
    room = len(before) + len(after) + 12
    model = LlamaConfig(1, 24, 40, 6, 2, room + 12, vocabulary.size, tied=True)
    params = create(model, 3)[1]
    save(params, model, tmp_path)
    vocabulary.save(tmp_path)
    unpack = {"smollm2-135m": tmp_path}
    monkeypatch.setattr(pretrained, "unpack", lambda name, folder: unpack[name])
    config = dataclasses.replace(
        TINY, model="smollm2-135m", dropout=0.0, data_dir=data_dir, source_length=room
    )
    prepared = prepare(config)
    jax.tree.map(np.testing.assert_array_equal, prepared.params, params)
    example = prepared.train[0]
    row, first = example["tokens"], example["first"] + 1
    np.testing.assert_array_equal(row[: len(before)], before)
    (text,) = vocabulary.decode([row[first:][: int(example["weights"].sum())]])
    assert text == prepared.splits["train"][0].target[: len(text)]
    assert text
    # Another seed draws other parameters of a model that is trained from scratch.
    task = Task(config, None, prepared, {"method": "adamw"})
    started = task.start(1)[1].params
    jax.tree.map(np.testing.assert_array_equal, started, params)


@pytest.mark.full
def test_what_is_forgotten(data_dir, tmp_path):
    """Plain texts are trained on, and other data sets are looked at in the end."""
    config = dataclasses.replace(
        TINY,
        dataset="prose",
        model="gpt2-tiny",
        methods=("flora_momentum",),
        eval_datasets=("code", "phrases"),
        data_dir=data_dir,
        output_dir=tmp_path,
    )
    (row,) = run(config)
    assert row["validation_loss"] < np.log(400)
    assert row["code_loss"] == pytest.approx(np.log(400), abs=0.5)
    assert 1 < row["phrases_loss"] < 20
    assert (tmp_path / "flora_momentum-r8/samples.txt").read_text().strip() == ""
    assert "code_loss" in (tmp_path / "report.md").read_text()
    prepared = prepare(config)
    cell = {"method": "flora_momentum", "rank": 8}
    made, state = Task(config, None, prepared, cell).start(1)
    # Of parameters that a seed draws there is no before.
    scores = Task(config, None, prepared, cell).judge(made, state)
    assert "code_loss" in scores
    assert "intruders" not in scores
    pretrained = dataclasses.replace(prepared, pretrained=True)
    task = Task(config, None, pretrained, cell)
    made, state = task.start(1)
    before = task.judge(made, state)
    assert before["relative_change"] == before["intruders"] == 0
    assert before["phrases_loss"] > 1
    state = state._replace(params=jax.tree.map(lambda x: 1.5 * x, state.params))
    assert task.judge(made, state)["relative_change"] == pytest.approx(0.5)


def test_a_t5_continues_no_plain_texts(data_dir):
    for fields in ({"dataset": "prose"}, {"eval_datasets": ("prose",)}):
        config = dataclasses.replace(TINY, data_dir=data_dir, **fields)
        with pytest.raises(
            ConfigError, match="no plain texts to continue, got 'prose'"
        ):
            prepare(config)


@pytest.mark.full
def test_from_a_checkpoint(data_dir, tmp_path):
    """Loads what transformers would, and refuses a vocabulary that does not fit."""
    config = dataclasses.replace(TINY, data_dir=data_dir, output_dir=tmp_path / "out")
    prepared = prepare(config)
    save(prepared.params, prepared.model, tmp_path)
    prepared.vocabulary.save(tmp_path)
    checkpoint = dataclasses.replace(config, checkpoint=tmp_path)
    loaded = prepare(checkpoint)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, prepared.params)
    assert loaded.model == prepared.model
    tokens = np.arange(1, 11).reshape(2, 5)
    batch = {"source": tokens, "target": tokens[:, :3]}
    losses = [mean_loss(p.graphdef, p.params, batch) for p in (prepared, loaded)]
    assert losses[0] == losses[1]

    small = dataclasses.replace(prepared.model, vocab_size=prepared.vocabulary.size - 1)
    save(create(small, 0)[1], small, tmp_path)
    with pytest.raises(ConfigError, match="tokens and `--checkpoint` .* only "):
        prepare(checkpoint)


FLAGS = (
    "phrases --methods flora_accumulation --ranks 8 --updates 8 --batch-size 16 "
    "--micro-batches 2 --vocab-size 400 --source-length 12 --target-length 12 "
    "--eval-every 4 --eval-examples 20 --decode-examples 12 --checkpoint-every 3 "
    "--dropout 0.1"
)
ROOT = pathlib.Path(__file__).parents[3]


def command(data_dir, folder):
    arguments = [*FLAGS.split(), "--data-dir", data_dir, "--output-dir", folder]
    return [sys.executable, "-m", "experiments.finetune", *map(str, arguments)]


def last_state(folder):
    path = (folder / "flora_accumulation-r8" / "checkpoints").absolute()
    with ocp.CheckpointManager(path) as manager:
        step = manager.latest_step()
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return step, manager.restore(step, args=args)["state"]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(data_dir, tmp_path, monkeypatch):
    """SIGKILL twice, at whatever it is doing; one device and eight agree too."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    programs = str(tmp_path / "programs")
    environment = process_environment(JAX_COMPILATION_CACHE_DIR=programs)
    settings = {"env": environment, "cwd": ROOT}
    subprocess.run(command(data_dir, whole), **settings, check=True, timeout=300)
    for rows in (3, 6):
        _run_and_kill(command(data_dir, killed), killed, rows, settings)
    assert last_state(killed)[0] < 8
    subprocess.run(command(data_dir, killed), **settings, check=True, timeout=300)
    expected = last_state(whole)
    assert expected[0] == 8
    jax.tree.map(np.testing.assert_array_equal, last_state(killed), expected)

    monkeypatch.undo()  # The other processes have all layers.
    devices = jax.sharding.Mesh(jax.devices(), ("data",))
    assert devices.size == 8
    monkeypatch.setattr("experiments.common.devices.mesh", lambda: devices)
    many = tmp_path / "many"
    assert main(command(data_dir, many)[3:]) == 0
    # Sums in another order; Adafactor makes much of what is nearly zero, so that single
    # parameters may differ more than the losses do.
    assert losses(many) == pytest.approx(losses(whole), rel=1e-3)


def losses(folder):
    rows = records.read_rows(folder / "flora_accumulation-r8" / "metrics.jsonl")
    return [row.get("loss", row.get("validation_loss")) for row in rows]


def _run_and_kill(arguments, folder, rows, settings):
    """Starts a training and kills it once it has logged so many rows.

    And not before it has something to go on from.
    """
    metrics = folder / "flora_accumulation-r8" / "metrics.jsonl"
    saved = metrics.parent / "checkpoints"
    process = subprocess.Popen(arguments, **settings, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while (
        not metrics.exists()
        or metrics.read_text().count("\n") < rows
        or checkpoints.latest(saved) is None
    ):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--updates 0", "`--updates` must be at least 1, got 0"),
        ("--ranks 8 0", "`--ranks` must be at least 1, got 0"),
        ("--source-length 1", "`--source-length` must be at least 2, got 1"),
        ("--target-length 1", "`--target-length` must be at least 2, got 1"),
        ("--ranks 8 8", "`--ranks` must name at least one, each once, got '8 8'"),
        ("--samples -1", "`--samples` must be non-negative, got -1"),
        ("--stop-after 0", "`--stop-after` must be between 1 and `--updates` (600)"),
        (
            "--learning-rate inf",
            "`--learning-rate` must be positive and finite, got in",
        ),
        ("--lora-alpha 0", "`--lora-alpha` must be positive and finite, got 0.0"),
        ("--dropout 1", "`--dropout` must be in [0, 1), got 1.0"),
        (
            "--micro-batches 5",
            "`--micro-batches` must divide `--batch-size` (32) for full_accumulation",
        ),
        (
            "--optimizer adam --methods flora_momentum",
            "`--methods` got flora_momentum, but `--optimizer adam` has a momentum of",
        ),
    ],
)
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert_refused(main, ["docstrings", *arguments.split()], message, capsys)


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ("none", "flora_momentum"), "ranks": (128,)},
            "`--ranks` 128 compresses no matrix of this model .*; give a lower rank",
        ),
        (
            {"model": "gpt2-tiny", "source_length": 250},
            "together must be at most 256, the model's context, got 262",
        ),
    ],
)
def test_settings_that_do_not_fit(changes, message, data_dir, tmp_path):
    config = dataclasses.replace(
        TINY, data_dir=data_dir, output_dir=tmp_path, **changes
    )
    with pytest.raises(ConfigError, match=message):
        run(config)
    assert not any(tmp_path.iterdir())  # refused before anything is trained


@pytest.mark.full
def test_accumulation_has_the_objective_of_no_accumulation(data_dir):
    """With targets of other lengths in each micro-batch, which SGD would show."""
    config = dataclasses.replace(
        TINY, data_dir=data_dir, optimizer="sgd", dropout=0.0, target_length=24
    )
    prepared, found = prepare(config), []
    for name in ("none", "full_accumulation"):
        task, state, tx = build(config, prepared, name, None)
        count = METHODS[name].micro_batches(config)
        for part in np.split(np.arange(config.batch_size), count):
            batch = {key: rows[part] for key, rows in task.batches[0].items()}
            state, _ = training_step(task, tx, state, {}, batch, jax.random.key(0))
        found.append(state.params)
    lengths = (task.batches[0]["target"] != 0).reshape(2, -1).sum(axis=1)
    assert lengths[0] != lengths[1]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *found
    )


@pytest.mark.full
def test_divergence_names_the_rate_to_lower(data_dir, tmp_path, capsys):
    arguments = command(data_dir, tmp_path)[3:]
    rate = ["--learning-rate", "1e30", "--warmup-fraction", "0"]
    assert main([*arguments, *rate]) == 1
    assert "lower `--learning-rate`" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_sense(name):
    PRESETS[name][1].validate()


def test_a_missing_data_set_says_what_to_do(tmp_path, capsys):
    arguments = ["xsum-t5-small", "--data-dir", str(tmp_path)]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert "xsum" in capsys.readouterr().err.lower()
