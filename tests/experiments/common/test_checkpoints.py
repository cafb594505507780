"""Checkpoints under faults: damage, a full disk, a kill during the write."""

import contextlib
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import checkpoints
from experiments.common.checkpoints import Checkpoints, State
from experiments.common.errors import ConfigError, DiskError

pytestmark = pytest.mark.xdist_group("experiments")

IDENTITY = {"--seed": 0}
ROOT = pathlib.Path(__file__).parents[3]


def make_state(update, size=64):
    values = np.random.default_rng(update).standard_normal((size, size))
    return State({"w": jnp.asarray(values, jnp.float32)}, (jnp.int32(update),))


TEMPLATE = make_state(0)


def assert_restores(folder, update, size=64):
    with contextlib.closing(Checkpoints(folder, IDENTITY)) as kept:
        found, state = kept.restore(make_state(0, size))
    assert found == update
    jax.tree.map(np.testing.assert_array_equal, state, make_state(update, size))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Three saves: the last two are kept."""
    folder = tmp_path_factory.mktemp("original") / "checkpoints"
    with contextlib.closing(Checkpoints(folder, IDENTITY)) as kept:
        for update in (2, 4, 10):
            kept.save(update, make_state(update))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return pathlib.Path(shutil.copytree(original, tmp_path / "checkpoints"))


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_the_last_two_are_kept(original):
    assert sorted(path.name for path in original.iterdir()) == ["10", "4"]
    assert checkpoints.latest(original) == 10
    assert checkpoints.latest(original / "nothing") is None
    assert_restores(original, 10)


def flip(file, place):
    """Flips one bit."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    file.write_bytes(content)


def test_every_flipped_byte_is_noticed(folder):
    """In every file, at its ends and in between; a restore could miss most of them."""
    path = folder / "10"
    assert checkpoints.defect(path) is None
    count = 0
    for file in files(path):
        intact = file.read_bytes()
        for place in (0.0, 0.1, 0.5, 0.9, 1.0):
            flip(file, place)
            assert checkpoints.defect(path) is not None, (file, place)
            file.write_bytes(intact)
            count += 1
    assert checkpoints.defect(path) is None
    assert count >= 5 * 10


def biggest(path):
    return max(files(path), key=lambda file: file.stat().st_size)


def truncate(path):
    file = biggest(path)
    os.truncate(file, file.stat().st_size // 2)


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def lose_all_but_the_checksums(path):
    text = (path / "checksums.json").read_text()
    empty(path)
    (path / "checksums.json").write_text(text)


DAMAGE = {
    "flipped array": (lambda path: flip(biggest(path), 0.7), "state/.* differs from"),
    "flipped metadata": (
        lambda path: flip(path / "_CHECKPOINT_METADATA", 0.0),
        "_CHECKPOINT_METADATA differs from what was written",
    ),
    "truncated": (truncate, "state/.* differs from what was written"),
    "missing": (lambda path: biggest(path).unlink(), "state/.* is missing"),
    "added": (
        lambda path: (path / "state" / "more").touch(),
        "state/more does not belong to it",
    ),
    "all missing": (lose_all_but_the_checksums, "_CHECKPOINT_METADATA is missing"),
    "empty": (empty, "it has no checksums.json, so its write did not end"),
    "flipped checksums": (
        lambda path: flip(path / "checksums.json", 0.0),
        "checksums.json is damaged",
    ),
    "no text": (
        lambda path: (path / "checksums.json").write_bytes(b"\xff\xfe"),
        "checksums.json is damaged",
    ),
    "no checksums": (
        lambda path: (path / "checksums.json").write_text("3"),
        "checksums.json is damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_for_the_one_before(folder, name, capsys):
    damage, defect = DAMAGE[name]
    damage(folder / "10")
    assert_restores(folder, 4)
    shown = capsys.readouterr().err
    expected = (
        rf"warning: {re.escape(str(folder))}/10 is not used: {defect}.*; "
        r"the one of update 4 is used, and "
    )
    aside = folder / "10.damaged"
    if name == "empty":
        expected += "it is removed"
    else:
        expected += r"what was there is now in 10\.damaged"
    assert aside.exists() == (name != "empty")
    assert re.search(expected, shown)
    assert "Traceback" not in shown
    # Training comes by the same update again.
    with contextlib.closing(Checkpoints(folder, IDENTITY)) as kept:
        kept.save(10, make_state(10))
    assert_restores(folder, 10)
    assert capsys.readouterr().err == ""


def test_an_unreadable_checkpoint_is_refused(folder, monkeypatch, capsys):
    contents = checkpoints.contents

    def fail(path):
        if path.name == "10":
            raise OSError(5, "Input/output error")
        return contents(path)

    monkeypatch.setattr(checkpoints, "contents", fail)
    assert_restores(folder, 4)
    assert "10 is not used: it cannot be read: Input/output" in capsys.readouterr().err


def test_no_checkpoint_is_whole(folder):
    truncate(folder / "4")
    biggest(folder / "10").unlink()
    message = (
        r"has no checkpoint that is whole \(4: state/.* differs .*; 10: state/.* is "
        r"missing\); restore one from a copy, or give `--overwrite` to start again"
    )
    with pytest.raises(ConfigError, match=message):
        Checkpoints(folder, IDENTITY)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "4"]


def test_what_a_kill_leaves_behind(folder, capsys):
    """A write that did not end, and an old checkpoint that is half deleted."""
    (folder / "12.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "4" / "checksums.json").unlink()
    assert_restores(folder, 10)
    assert [path.name for path in folder.iterdir()] == ["10"]
    assert capsys.readouterr().err == ""


def test_killed_before_the_first_checksums(folder, capsys):
    shutil.rmtree(folder / "4")
    (folder / "10" / "checksums.json").unlink()
    assert checkpoints.latest(folder) is None
    with contextlib.closing(Checkpoints(folder, IDENTITY)) as kept:
        assert kept.latest() is None
    expected = "did not end; training begins, and what was there is now in 10.damaged"
    assert expected in capsys.readouterr().err


def test_training_goes_on_during_the_save(tmp_path):
    """The step donates what is being written; the file holds what it was before."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = step(make_state(1, 2000))  # 16 MB, which do not compress
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    steps = 0
    with contextlib.closing(Checkpoints(tmp_path, IDENTITY)) as kept:
        kept.save(1, state)
        while kept._manager.is_saving_in_progress():
            state = jax.block_until_ready(step(state))
            steps += 1
        _, saved = kept.restore(state)
    assert steps >= 1
    jax.tree.map(np.testing.assert_array_equal, saved, expected)
    assert float(state.opt_state[0]) == expected.opt_state[0] + steps
    # Else there was no danger.
    pointer = state.params["w"].unsafe_buffer_pointer()
    assert step(state).params["w"].unsafe_buffer_pointer() == pointer


def test_full_disk(folder, monkeypatch):
    """It is noticed before anything is written, and training can go on later."""
    used = shutil.disk_usage(folder)
    needed = 4 * 64 * 64 + 4
    kept = Checkpoints(folder, IDENTITY)
    message = (
        r"checkpoints: the checkpoint of update 11 could not be written: No space left "
        r"on device; make room or give another `--output-dir`; the one of update 10 is "
        "whole, and resuming starts there"
    )
    with contextlib.closing(kept), monkeypatch.context() as patch:
        full = used._replace(free=needed - 1)
        patch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(DiskError, match=message):
            kept.save(11, make_state(11))
    assert sorted(path.name for path in folder.iterdir()) == ["10", "4"]
    assert_restores(folder, 10)
    with contextlib.closing(Checkpoints(folder, IDENTITY)) as kept:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=needed))
        kept.save(11, make_state(11))
    assert_restores(folder, 11)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, IDENTITY)

    def fail(path):
        raise ValueError("something else")

    monkeypatch.setattr(checkpoints, "contents", fail)
    kept.save(1, TEMPLATE)
    with pytest.raises(ValueError, match="^something else$"):
        kept.close()
