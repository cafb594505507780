"""The command line, and the files that it reads shapes from."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import flora_jax as fj
from flora_jax import optimizers
from flora_jax.cli import picture as _picture
from flora_jax.cli import plan as _command
from flora_jax.cli.model_files import ModelFileError, read_shapes
from flora_jax.memory.planner import format_bytes

GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
T5 = {
    "model_type": "t5",
    "d_model": 1024,
    "d_kv": 128,
    "d_ff": 16384,
    "num_heads": 32,
    "num_layers": 24,
    "vocab_size": 32128,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
SMALL = GPT2 | {"n_embd": 128, "n_layer": 1, "n_positions": 64, "vocab_size": 500}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # Or rich breaks the rows.

    def write(content, name="config.json"):
        path = tmp_path / name
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        path.write_bytes(content)
        return str(path)

    return write


# Sizes that the models' authors report, or that their published checkpoints have.
PUBLISHED = [
    (GPT2, 124_439_808),
    (GPT2 | {"n_embd": 1600, "n_layer": 48}, 1_557_611_200),
    (T5, 2_851_598_336),
    (LLAMA, 6_738_415_616),
    (
        LLAMA
        | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
        8_030_261_248,
    ),
    (  # T5 1.1 small.
        T5
        | {
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 1024,
            "num_heads": 6,
            "num_layers": 8,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        76_961_152,
    ),
]


@pytest.mark.parametrize(("config", "size"), PUBLISHED)
def test_sizes_of_published_models(write, config, size):
    shapes = read_shapes(write(config))
    assert sum(math.prod(x.shape) for x in shapes.values()) == size
    assert {x.dtype.name for x in shapes.values()} == {"float32"}


def test_configurations_say_more(write):
    untied = read_shapes(write(SMALL | {"tie_word_embeddings": False, "n_inner": 256}))
    assert untied["lm_head.weight"].shape == (500, 128)
    assert untied["h.0.mlp.c_fc.weight"].shape == (128, 256)
    biased = LLAMA | {"num_hidden_layers": 1, "attention_bias": True, "head_dim": 256}
    shapes = read_shapes(write(biased | {"torch_dtype": "bfloat16"}))
    assert shapes["model.layers.0.self_attn.q_proj.bias"].shape == (8192,)
    assert "model.layers.0.mlp.up_proj.bias" not in shapes
    assert shapes["model.norm.weight"].dtype.name == "bfloat16"
    cast = read_shapes(write(biased), "float16")
    assert {x.dtype.name for x in cast.values()} == {"float16"}


TENSORS = {
    "h.0.attn.c_attn.weight": np.zeros((128, 384), np.float16),
    "h.0.attn.c_attn.bias": np.zeros(384, np.float32),
    "wte.weight": np.zeros((500, 128), np.float32),
}


def as_shapes(tensors):
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in tensors.items()}


def test_safetensors_and_their_index(tmp_path):
    masks = {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8)}
    save_file(TENSORS | masks, tmp_path / "model.safetensors", {"format": "pt"})
    assert read_shapes(tmp_path / "model.safetensors") == as_shapes(TENSORS)
    names = {name: f"{i}.safetensors" for i, name in enumerate(TENSORS)}
    for name, file in names.items():
        save_file({name: TENSORS[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert read_shapes(index) == as_shapes(TENSORS)
    index.write_text(json.dumps({"weight_map": names | {"more": "0.safetensors"}}))
    with pytest.raises(ModelFileError, match="do not hold more"):
        read_shapes(index)
    index.write_text(json.dumps({"weight_map": ["0.safetensors"]}))
    with pytest.raises(ModelFileError, match="'weight_map' is not an object"):
        read_shapes(index)
    index.write_text(json.dumps({"weight_map": {"more": "9.safetensors"}}))
    with pytest.raises(ModelFileError, match=r"9\.safetensors: No such file"):
        read_shapes(index)


def header(entries, length=None):
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


DEEP = (200_000).to_bytes(8, "little") + b"[" * 200_000


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("m.safetensors", b"", "no safetensors header of 0 bytes"),
        ("m.safetensors", header({}, 2**60), "no safetensors header of 1152921504"),
        ("m.safetensors", header({})[:-1], "no safetensors header of 2 bytes"),
        ("m.safetensors", b"\4" + bytes(7) + b"{{}}", "header is damaged"),
        ("m.safetensors", header({"w": 3}), "header is damaged"),
        ("m.safetensors", header([]), "header is damaged"),
        ("m.safetensors", header({"w": {"shape": "12"}}), "header is damaged"),
        ("m.safetensors", header({"w": {"shape": [-1]}}), "header is damaged"),
        ("m.safetensors", header({"w": {"shape": [2.5]}}), "header is damaged"),
        ("m.safetensors", header({"w": {"shape": [True]}}), "header is damaged"),
        ("m.safetensors", header({"w": {"shape": [2**40]}}), "header is damaged"),
        ("m.safetensors", DEEP, "header is damaged"),
        ("m.safetensors", header({}), "it holds no parameters"),
        (
            "m.safetensors",
            header({"w": {"shape": [2], "dtype": []}}),
            r"w is of dtype \[\], which is not trained",
        ),
        ("m.json", DEEP[8:], "not JSON .maximum recursion depth"),
        ("m.json", {"weight_map": {"w": "../m.safetensors"}}, "not the name of a file"),
        ("m.json", {"weight_map": {"w": "a\0b"}}, "not the name of a file"),
        ("m.json", {"model_type": ["t5"]}, "is not known, only gpt2"),
        ("m.json", GPT2 | {"n_layer": 10**9}, "'n_layer' must be .* got 1000000000"),
        ("m.json", GPT2 | {"torch_dtype": "int32"}, "dtype 'int32' is not known"),
        (
            "m.safetensors",
            header({"w": {"shape": [2], "dtype": "I8"}}),
            "w is of dtype I8, which is not trained",
        ),
        ("m.bin", b"\x80\4", "not JSON .* give a .safetensors file"),
        ("m.json", b"[1]", "its JSON is not an object"),
        ("m.json", {"a": 1}, "neither an index .* nor a model's configuration"),
        ("m.json", {"model_type": "bert"}, "model_type 'bert' is not known, only gpt2"),
        ("m.json", {"model_type": "gpt2"}, "'n_embd' must be a positive integer"),
        ("m.json", GPT2 | {"n_layer": True}, "'n_layer' must be .* got True"),
        ("m.json", GPT2 | {"torch_dtype": "float9"}, "dtype 'float9' is not known"),
    ],
)
def test_bad_files(write, capsys, name, content, match):
    path = write(content, name)
    with pytest.raises(ModelFileError, match=match):
        read_shapes(path)
    with pytest.raises(SystemExit, match="2"):
        _command.main(["plan", "--shapes", path, "--rank", "4"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m flora_jax plan: error: {path}: ")


def test_missing_files(tmp_path, capsys):
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(SystemExit, match="2"):
            _command.main(["plan", "--shapes", str(tmp_path / name), "--rank", "4"])
        assert capsys.readouterr().err.endswith("No such file or directory\n")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("", "give --rank, or --budget or --chip for the largest rank that fits"),
        (
            "--rank 8 --reserve 1GB",
            "--reserve needs --budget or --chip to be taken from",
        ),
        ("--chip v5e --budget 1GB", "--budget: not allowed with argument --chip"),
        ("--chip v5e --reserve 16GB", "must leave some of the budget, got 14.9 GiB"),
        ("--chip v9", "invalid choice: 'v9'"),
        ("--rank 0", "argument --rank: must be a positive integer, got '0'"),
        ("--rank many", "must be a positive integer, got 'many'"),
        ("--budget 24", "must be a number with one of KiB, .* for example 24GiB"),
        ("--budget 24gib", "got '24gib'"),
        (f"--budget {'9' * 400}GB", "must be a number with one of KiB"),
        ("--rank 4 --optimizer sgd", "invalid choice: 'sgd'"),
        ("--rank 4 --optimizer adamw", "give --accumulate for compressed"),
        ("--rank 4 --sketch-gradients", "flora needs whole gradients; give --accum"),
        ("--rank 4 --picture a.pdf", "must end in .png"),
        ("--rank 4 --picture nowhere/a.png", "its folder does not exist"),
    ],
)
def test_bad_arguments(write, capsys, arguments, match):
    path = write(SMALL)
    with pytest.raises(SystemExit, match="2"):
        _command.main(["plan", "--shapes", path, *arguments.split()])
    *_, last = capsys.readouterr().err.splitlines()
    assert re.search(match, last)


def test_a_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setattr(_picture.importlib.util, "find_spec", lambda name: None)
    assert _picture.problem("a.png").startswith("matplotlib is missing; pip install")


def plan(write, *arguments):
    return _command.main(["plan", "--shapes", write(SMALL), *arguments])


# adafactor has nothing to sketch: it is for --accumulate.
@pytest.mark.parametrize("optimizer", sorted({*optimizers.__all__} - {"adafactor"}))
def test_every_optimizer(write, capsys, optimizer):
    assert plan(write, "--optimizer", optimizer, "--rank", "8") == 0
    out = capsys.readouterr().out
    shapes = read_shapes(write(SMALL))
    make = getattr(fj, optimizer)
    tx = make(1.0, fj.Sketch(8, mask=lambda path, shape: path[0] == "h"))
    state = fj.memory_plan(tx, shapes, compare={}).state_bytes
    assert f"{optimizer}, rank 8: " in out
    assert f"+ {state / 1024:.0f} KiB state" in out or f"{state / 2**20:.2f} MiB" in out


def test_a_budget_of_everything(write, capsys, tmp_path):
    """Parameters and gradients are in it; the rank is the largest that fits."""
    shapes = read_shapes(write(SMALL))
    own = sum(4 * math.prod(x.shape) for x in shapes.values())

    def needed(rank):
        mask = {name: name.startswith("h") for name in shapes}
        tx = fj.flora(1.0, fj.Sketch(rank, mask=mask))
        return 2 * own + fj.memory_plan(tx, shapes, compare={}).state_bytes

    budget = f"{needed(20) / 1000:.3f}KB"
    picture = tmp_path / "bars.png"
    assert plan(write, "--budget", budget, "--picture", str(picture)) == 0
    out = capsys.readouterr().out
    assert "flora, rank 20: " in out
    assert "B left" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plan(write, "--budget", budget, "--rank", "21") == 1
    assert "missing" in capsys.readouterr().out
    assert plan(write, "--budget", "1TB") == 0
    assert "At rank 128 nothing is sketched: " in capsys.readouterr().out
    for size in (f"{2 * own / 1000}KB", f"{(2 * own + 99) / 1000}KB"):
        assert plan(write, "--budget", size) == 1
        out, err = capsys.readouterr()
        assert "flora, rank 1: " in out
        assert "missing" in out
        assert "no rank fits: showing rank 1" in err


def test_sketches_of_gradients(write, capsys, tmp_path):
    """They take what the accumulator does; the rank is the largest that fits."""
    shapes = read_shapes(write(SMALL))
    own = sum(4 * math.prod(x.shape) for x in shapes.values())

    def state(rank):
        mask = {name: name.startswith("h") for name in shapes}
        tx = optax.adafactor(1.0)
        tx = fj.compressed_accumulation(tx, 4, fj.Sketch(rank, mask=mask))
        return jax.eval_shape(tx.init, shapes)

    def sketches(rank):
        return sum(4 * x.size for x in jax.tree.leaves(state(rank).acc_grads))

    def needed(rank):
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state(rank)))
        return own + sketches(rank) + whole

    options = ["--optimizer", "adafactor", "--accumulate", "4", "--sketch-gradients"]
    budget = ["--budget", f"{needed(20) / 1000:.3f}KB"]
    picture = ["--picture", str(tmp_path / "bars.png")]
    assert plan(write, *options, *budget, *picture) == 0
    out = capsys.readouterr().out
    assert "adafactor, rank 20, accumulation of 4: " in out
    assert f"+ {sketches(20) / 1024:.0f} KiB sketches of gradients + " in out
    assert plan(write, *options, *budget, "--rank", "21") == 1


def test_a_chip_is_a_budget_with_room_reserved(write, capsys):
    def output(*arguments):
        code = plan(write, *arguments)
        return code, capsys.readouterr().out

    named = output("--chip", "v5e")
    spelled = output("--budget", "16GB", "--reserve", "1.6GB")
    assert named == spelled
    assert named[0] == 0
    assert "reserved: 1.49 GiB\nbudget 13.4 GiB: " in named[1]
    # What is reserved is not there for the state.
    assert output("--chip", "v5e", "--rank", "8", "--reserve", "15.99999GB")[0] == 1


def test_accumulation_dtype_and_embeddings(write, capsys):
    arguments = ["--rank", "8", "--optimizer", "adafactor", "--accumulate", "4"]
    assert plan(write, *arguments) == 0
    apart = capsys.readouterr().out
    assert "adafactor, rank 8, accumulation of 4: " in apart
    assert apart.count("the mask leaves it out") == 2
    assert plan(write, *arguments, "--sketch-embeddings", "--dtype", "bfloat16") == 0
    assert "the mask leaves it out" not in capsys.readouterr().out
    assert apart.count("optax.MultiSteps(adafactor)") == 1
    assert plan(write, *arguments[:3], "adamw", *arguments[4:]) == 0
    shapes = read_shapes(write(SMALL))
    steps = optax.MultiSteps(optax.adamw(1.0), 4).gradient_transformation()
    size = fj.memory_plan(steps, shapes, compare={}).state_bytes
    row = rf"optax.MultiSteps\(adamw\) +│ +{format_bytes(size)} "
    assert re.search(row, capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--optimizer", "galore", "--sketch-embeddings"],
        ["--optimizer", "adamw", "--accumulate", "4"],
        ["--optimizer", "adamw", "--accumulate", "4", "--sketch-gradients"],
        ["--optimizer", "flora", "--accumulate", "4", "--sketch-embeddings"],
    ],
)
def test_the_script_makes_what_was_planned(write, capsys, arguments):
    assert plan(write, "--rank", "8", *arguments) == 0
    out = capsys.readouterr().out
    names = {"fj": fj, "optax": optax, "learning_rate": 1.0, "loss": sum}
    for line in out.split("In a script:\n")[1].splitlines():
        exec(line.strip(), names)
    assert ("value_and_grad" in names) == ("--sketch-gradients" in arguments)
    planned = fj.memory_plan(names["tx"], read_shapes(write(SMALL)), compare={})
    assert f"+ {format_bytes(planned.state_bytes)} state" in out


HIDDEN = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "rich" else find(name)
"""
RUN = "import runpy; runpy.run_module('flora_jax', run_name='__main__')"


@pytest.mark.sample(1)
@pytest.mark.parametrize("code", [RUN, HIDDEN + RUN], ids=["rich", "plain"])
def test_a_reader_that_stops_early(write, code):
    command = [sys.executable, "-c", code, "plan", "--rank", "8", "--shapes"]
    process = subprocess.Popen(
        [*command, write(SMALL)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_nothing_is_sketched(write, capsys):
    """A budget without a rank to choose is compared with what is there."""
    narrow = write(SMALL | {"n_embd": 64})
    assert _command.main(["plan", "--shapes", narrow, "--budget", "1GiB"]) == 0
    out, err = capsys.readouterr()
    assert "At rank 1 nothing is sketched" in out
    assert not err


def test_a_picture_that_cannot_be_written(write, capsys, tmp_path):
    (tmp_path / "bars.png").mkdir()
    with pytest.raises(SystemExit, match="2"):
        plan(write, "--rank", "8", "--picture", str(tmp_path / "bars.png"))
    assert capsys.readouterr().err.endswith("bars.png: Is a directory\n")


PLANNING = Path(fj.__file__).parents[1] / "docs/planning.md"
PREDICTED = {
    "flora": ["--optimizer", "flora"],
    "flora_adamw": ["--optimizer", "flora_adamw"],
    "compressed_accumulation(adafactor)": [
        *("--optimizer", "adafactor", "--accumulate", "16")
    ],
}


@pytest.mark.full
@pytest.mark.parametrize("name", PREDICTED)
def test_the_guide_says_what_the_command_says(write, capsys, name):
    """Its table of predictions, to the digits that it has."""
    row = next(
        line
        for line in PLANNING.read_text().splitlines()
        if line.startswith(f"| `{name}` |") and len(line.split("|")) == 7
    )
    stated = [float(cell) for cell in row.split("|")[2:-1]]
    xl = GPT2 | {"n_embd": 1600, "n_layer": 48}
    for config, value in ((xl, stated[0]), (T5, stated[2])):
        arguments = ["plan", "--shapes", write(config), "--rank", "256"]
        assert _command.main([*arguments, *PREDICTED[name]]) == 0
        total = re.search(r"\+ (\S+) GiB state = ", capsys.readouterr().out)
        assert float(total[1]) == pytest.approx(value, abs=0.006)
