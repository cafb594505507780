"""What LoRA and FLORA do to the weights, on weights whose answer is known."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.common.errors import ConfigError, NonFiniteLossError
from experiments.common.spectra import changes, decompose
from experiments.dynamics import run as dynamics
from experiments.dynamics.config import Config, Run
from experiments.finetune.config import Config as FinetuneConfig
from experiments.finetune.prepare import prepare
from experiments.models.hugging_face import save
from tests.experiments import phrases

UPDATES, RANK = 3, 4


def rotated(matrix, seed=0):
    """The same matrix in other bases, which change none of the answers."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in matrix.shape)
    return left @ matrix @ right


def test_a_change_with_an_intruder():
    """One part along a direction of before, the other along a new one."""
    before = np.zeros((40, 20))
    np.fill_diagonal(before, np.linspace(20, 1, 20))
    change = np.zeros_like(before)
    change[0, 0], change[30, 19] = 5, 100
    found = decompose(rotated(before), rotated(before + change))
    np.testing.assert_allclose(found["singular_values"][:2], [100, 5])
    assert max(found["singular_values"][2:]) < 1e-12
    shares = np.array([100, 5]) / 105
    entropy = -(shares * np.log(shares)).sum()
    assert found["effective_rank"] == pytest.approx(np.exp(entropy))
    # Column 19 was 1 along row 19, and is 100 along row 30: cosine 0.01.
    assert found["intruders"] == 1
    size = np.sqrt(100**2 + 5**2) / np.linalg.norm(before)
    assert found["relative_change"] == pytest.approx(size)


@pytest.mark.parametrize(("slope", "intruders"), [(1.6, 0), (1.9, 1)])
def test_an_intruder_has_no_cosine_of_one_half(slope, intruders):
    """A vector turned by atan(slope): cosines 0.53 and 0.47; √3 is the limit."""
    before = np.zeros((40, 12))
    np.fill_diagonal(before, np.linspace(20, 9, 12))
    change = np.zeros_like(before)
    change[30, 0] = slope * before[0, 0]
    assert decompose(before, before + change)["intruders"] == intruders


def test_layers_that_are_stacked_are_taken_one_by_one():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 3, 20, 10))
    found = changes(
        {"h": {"mlp": {"kernel": before}}}, {"h": {"mlp": {"kernel": after}}}
    )
    expected = {
        f"h/mlp/kernel/{i}": decompose(*pair)
        for i, pair in enumerate(zip(before, after, strict=True))
    }
    assert found == expected


def test_no_change():
    found = decompose(np.eye(20), np.eye(20))
    assert found["relative_change"] == found["intruders"] == 0
    assert found["effective_rank"] == 1


def test_new_directions_below_the_first_ten_do_not_count():
    before = np.zeros((40, 20))
    np.fill_diagonal(before, np.linspace(20, 1, 20))
    change = np.zeros_like(before)
    change[30, 19] = 3
    assert decompose(before, before + change)["intruders"] == 0


def test_effective_rank_of_equal_singular_values():
    change = np.zeros((30, 20))
    np.fill_diagonal(change[:7], 0.5)
    before = np.eye(30, 20)
    found = decompose(before, before + rotated(change))
    assert found["effective_rank"] == pytest.approx(7)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny run from a tiny checkpoint."""
    phrases.shrink(monkeypatch)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    start = prepare(
        FinetuneConfig(
            dataset="phrases",
            model="gpt2-tiny",
            vocab_size=300,
            source_length=12,
            target_length=12,
        )
    )
    save(start.params, start.model, checkpoint)
    start.vocabulary.save(checkpoint)
    return Config(
        checkpoint,
        output_dir=tmp_path / "out",
        data_dir=tmp_path,
        rank=RANK,
        sgd_learning_rates=(0.03,),
        adafactor_learning_rate=0.1,
        runs=(
            Run("none", None, 0.05),
            Run("lora_accumulation", RANK, 0.1),
            Run("flora_accumulation", RANK, 0.05),
        ),
        updates=UPDATES,
        batch_size=8,
        micro_batches=2,
    )


@pytest.mark.full
def test_from_a_checkpoint_to_the_pictures(config):
    dynamics.run(config)
    found = json.loads((config.output_dir / "dynamics.json").read_text())
    sgd, adafactor = (trace["points"] for trace in found["traces"])
    assert [point["update"] for point in sgd] == [1, 2, 3]
    # From B = 0 the theorem is exact for one update of SGD: A moves by G Bᵀ = 0.
    assert sgd[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert all(0.99 < point["cosine"] < 1 + 1e-5 for point in sgd)
    # Adafactor divides by roots of second moments, which turns the change.
    assert adafactor[0]["cosine"] < 0.99
    assert sgd[0]["loss"] == pytest.approx(adafactor[0]["loss"], rel=1e-5)

    spectra = {each["method"]: each for each in found["spectra"]}
    for name, spectrum in spectra.items():
        assert np.isfinite(spectrum["validation_loss"])
        assert len(spectrum["matrices"]) == 4
        for path, matrix in spectrum["matrices"].items():
            values = np.array(matrix["singular_values"])
            assert len(values) == 128
            assert matrix["relative_change"] > 0
            if name.startswith("lora"):
                # Nothing else but the rounding of float32 weights.
                assert max(values[RANK:]) < 1e-4 * values[0], path
                assert matrix["effective_rank"] < RANK + 0.1
            else:
                assert values[RANK] > 1e-3 * values[0], path

    table = (config.output_dir / "dynamics.md").read_text()
    assert f"| SGD, 0.03 | {sgd[0]['cosine']:.3f} | {sgd[1]['cosine']:.3f} |" in table
    loss = spectra["lora_accumulation"]["validation_loss"]
    assert f"| LoRA accumulation, r={RANK} | 0.1 | {loss:.3f} |" in table
    for name in ("cosine", "spectra"):
        assert (config.output_dir / f"{name}.png").stat().st_size > 10_000


@pytest.mark.full
def test_the_first_measurement_alone(config):
    dynamics.run(dataclasses.replace(config, traces_only=True))
    found = json.loads((config.output_dir / "dynamics.json").read_text())
    assert found["spectra"] == []
    assert [trace["title"] for trace in found["traces"]] == [
        "SGD, 0.03",
        "Adafactor, 0.1",
    ]
    assert not (config.output_dir / "spectra.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": 0}, "`--updates` must be at least 1, got 0"),
        ({"rank": 0}, "`--rank` must be at least 1, got 0"),
        ({"sgd_learning_rates": ()}, "`--sgd-learning-rates` must name at least one"),
    ],
)
def test_refuses_what_makes_no_sense(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(Config(tmp_path), **changes).validate()


def test_a_run_that_diverges():
    with pytest.raises(NonFiniteLossError, match="SGD, 3: the loss is inf; lower that"):
        dynamics._check("SGD, 3", np.float32(np.inf))
