"""What tells one model from another at the same path."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from proxy_jax.checkpoints.fingerprint import fingerprint
from proxy_jax.errors import InputError

LARGE = 8 * 2**20


def changed_at(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("size", [1, 1000, 2**20, 2**21])
def test_every_byte_of_a_file_of_this_size_counts(tmp_path, size):
    path = tmp_path / "m.gguf"
    path.write_bytes(np.random.default_rng(0).bytes(size))
    before = fingerprint(path)
    assert fingerprint(shutil.copy(path, tmp_path / "copy")) == before
    for place in {0, size // 2, size - 1}:
        changed_at(path, place)
        assert fingerprint(path) != before
        changed_at(path, place)
    assert fingerprint(path) == before


def test_of_a_large_file_header_ends_and_samples_count(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(LARGE))
    before = fingerprint(path)
    for place in (0, 2**20 - 1, 2**20, LARGE - 1):
        changed_at(path, place)
        assert fingerprint(path) != before
        changed_at(path, place)
    # As a further training changes it: a little, all over.
    values = np.fromfile(path, np.uint8)
    values[:: LARGE // 1000] += 1
    values.tofile(path)
    assert fingerprint(path) != before
    path.write_bytes(bytes(LARGE + 1))
    assert fingerprint(path) != before


def test_of_a_directory_the_model_counts(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text(name)
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("more")
    assert fingerprint(tmp_path) == before
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("other")
        assert fingerprint(tmp_path) != before
        (tmp_path / name).write_text(name)
    os.rename(tmp_path / "tokenizer.json", tmp_path / "tokenizers.json")
    assert fingerprint(tmp_path) != before


def test_a_model_of_the_hub_has_its_commit(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    assert fingerprint(snapshot) == "commit " + "0123456789" * 4


def test_nothing_to_tell(tmp_path):
    with pytest.raises(InputError, match="holds no files of a model"):
        fingerprint(tmp_path)
    with pytest.raises(InputError, match="absent: No such file or directory"):
        fingerprint(tmp_path / "absent")
