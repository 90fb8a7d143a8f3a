"""Checkpoints that are not whole: each damage is noticed, and costs no more than one checkpoint."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxy_jax.errors import InputError
from train.checkpoint import Checkpoints
from train.step import TrainState


class Position:
    """A data iterator's state."""

    def set_state(self, state):
        self.state = state


def state_after(step):
    weights = np.random.default_rng(step).normal(size=(50, 60)).astype(np.float32)
    trained = {"layers": ({"w": jnp.asarray(weights)},)}
    return TrainState(jnp.int32(step), trained, (jnp.ones(3),), jax.random.key(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory, 2, 3) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, state_after(step), {"next": step}, None)
    return directory


def restore(directory):
    position = Position()
    with Checkpoints(directory, 2, 3) as checkpoints:
        state, damaged = checkpoints.restore(state_after(0), position)
    return state, damaged, position.state


def assert_is(state, step):
    """All bits are those that were saved."""
    expected = state_after(step)
    assert int(state.step) == step
    for a, b in zip(
        jax.tree.leaves((state.trained, state.moments, jax.random.key_data(state.key))),
        jax.tree.leaves((expected.trained, expected.moments, jax.random.key_data(expected.key))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(directory):
    """One bit of the weights."""
    path = largest(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def empty(directory):
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGES = {
    "a bit flipped": flip,
    "a file cut": lambda p: largest(p).write_bytes(largest(p).read_bytes()[:100]),
    "a file of zeros": lambda p: largest(p).write_bytes(bytes(largest(p).stat().st_size)),
    "an index gone": lambda p: (p / "state" / "manifest.ocdbt").unlink(),
    "metadata gone": lambda p: (p / "_CHECKPOINT_METADATA").unlink(),
    "metadata cut": lambda p: (p / "_CHECKPOINT_METADATA").write_text('{"custom_meta'),
    "arrays gone": lambda p: shutil.rmtree(p / "state"),
    "all gone": empty,
}


def test_a_whole_one(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    state, damaged, position = restore(tmp_path / "c")
    assert_is(state, 6)
    assert (damaged, position) == ("", {"next": 6})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one(saved, tmp_path, damage, capfd):
    directory = tmp_path / "c"
    shutil.copytree(saved, directory)
    DAMAGES[damage](directory / "6")
    state, damaged, position = restore(directory)
    assert_is(state, 4)
    assert position == {"next": 4}
    assert damaged.startswith(f"checkpoint {directory}/6 is damaged (")
    assert damaged.endswith("renamed to 6.damaged")
    assert "\n" not in damaged
    assert {p.name for p in directory.iterdir()} == {"2", "4", "6.damaged"}
    assert "Traceback" not in capfd.readouterr().err
    # The step is saved again, and another damage does not overwrite what was set aside.
    with Checkpoints(directory, 2, 3) as checkpoints:
        checkpoints.save(6, state_after(6), {"next": 6}, None)
    assert_is(restore(directory)[0], 6)
    empty(directory / "6")
    assert restore(directory)[1].endswith("renamed to 6.damaged1")


def test_several_damaged_ones(saved, tmp_path):
    directory = tmp_path / "c"
    shutil.copytree(saved, directory)
    flip(directory / "6")
    empty(directory / "4")
    state, damaged, _ = restore(directory)
    assert_is(state, 2)
    assert "6.damaged; checkpoint" in damaged
    assert damaged.endswith("4.damaged")


def test_none_is_whole(saved, tmp_path):
    directory = tmp_path / "c"
    shutil.copytree(saved, directory)
    for step in ("2", "4", "6"):
        flip(directory / step)
    message = r"c: no checkpoint is whole, of 6, 4, 2 \(ValueError: trained/layers/0/w is not what"
    with pytest.raises(InputError, match=message):
        restore(directory)
    assert {p.name for p in directory.iterdir()} == {"2", "4", "6"}


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(InputError, match="c: not a directory"):
        Checkpoints(tmp_path / "c", 2, 3)


def test_what_cannot_be_written(tmp_path):
    """A file stands where the checkpoint's directory would."""
    directory = tmp_path / "c"

    def save():
        with Checkpoints(directory, 2, 3) as checkpoints:
            shutil.rmtree(directory)
            directory.write_text("")
            checkpoints.save(2, state_after(2), {}, None)

    with pytest.raises(InputError, match="c: cannot write; the same command goes on") as error:
        save()
    assert "\n" not in str(error.value)
