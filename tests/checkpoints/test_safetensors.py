"""Hugging Face directories: what we write loads in transformers, and what is broken is named."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from proxy_jax.checkpoints import safetensors as ours
from proxy_jax.checkpoints.names import canonical, tensors
from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint, export
from proxy_jax.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def llama(build, tmp_path) -> Path:
    """A copy of a directory, to be damaged."""
    return shutil.copytree(build("llama").path, tmp_path / "llama")


@pytest.fixture
def sharded(build, tmp_path, monkeypatch) -> list[Path]:
    """The files of a directory with an index."""
    monkeypatch.setattr(ours, "_SHARD_BYTES", 30_000)
    reference = build("llama")
    export(reference.config, reference.params, tmp_path / "sharded")
    return sorted((tmp_path / "sharded").glob("*.safetensors"))


def test_export_loads_in_transformers(reference, tmp_path):
    export(reference.config, reference.params, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    expected = reference.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    with torch.no_grad():
        logits = model(torch.from_numpy(reference.tokens)).logits.numpy()
    np.testing.assert_allclose(logits, reference.logits, rtol=0, atol=1e-6)


def test_export_in_bfloat16_loads_in_transformers(build, tmp_path):
    reference = build("qwen2")
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype("bfloat16"), reference.params)
    export(reference.config, params, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, weight in reference.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16()), name


def test_export_in_several_files(build, sharded):
    assert len(sharded) > 3
    assert all(file.stat().st_size < 40_000 for file in sharded)
    sizes = [a.nbytes for file in sharded for a in safetensors.numpy.load_file(file).values()]
    path = sharded[0].parent
    index = json.loads((path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert len(index["weight_map"]) == len(sizes)
    expected = build("llama").model.state_dict()
    model = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(w, expected[name]) for name, w in model.state_dict().items())
    checkpoint = SafetensorsCheckpoint(path)
    for name, weight in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name, (slice(None),) * weight.ndim), weight)


@pytest.mark.parametrize("name", ["llama_yarn_biases", "qwen3", "gemma2", "olmo2"])
def test_a_part_of_ours_is_read_from_a_part_of_the_file(build, name):
    """Asymmetric slices of every layout, against the whole tensor of torch."""
    reference = build(name)
    sizes = reference.config.sizes
    weights = reference.model.state_dict()
    # The last tensor of each layout: of a layer, not the first.
    layouts = {(tensor.source, tensor.target): tensor for tensor in tensors(reference.config)}
    assert len(layouts) >= 7
    for tensor in layouts.values():
        merged = {letter for group in tensor.source for letter in group[1:]}
        index = tuple(
            slice(None) if letter in merged else slice(1, sizes[letter] - sizes[letter] // 3)
            for letter in tensor.target
        )
        part = reference.checkpoint.read(tensor.name, tensor.source_index(index))
        whole = _split(weights[tensor.name].numpy(), tensor.source, sizes, tensor.target)
        np.testing.assert_array_equal(tensor.to_ours(part), whole[index], err_msg=tensor.name)
        assert part.size == whole[index].size, tensor.name  # nothing was read and thrown away


def _split(array, source, sizes, target):
    """The file's tensor in our order of axes, found element by element."""
    shape = tuple(sizes[letter] for letter in target)
    out = np.empty(shape, array.dtype)
    for place in np.ndindex(shape):
        at = dict(zip(target, place, strict=True))
        where = []
        for group in source:
            flat = 0
            for letter in group:
                flat = flat * sizes[letter] + at[letter]
            where.append(flat)
        out[place] = array[tuple(where)]
    return out


def test_spellings_of_vision_language_checkpoints():
    assert canonical("language_model.model.layers.0.x") == "model.layers.0.x"
    assert canonical("language_model.lm_head.weight") == "lm_head.weight"
    assert canonical("model.language_model.norm.weight") == "model.norm.weight"
    assert canonical("model.norm.weight") == "model.norm.weight"
    for other in (
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.vision_model.post_layernorm.bias",
        "multi_modal_projector.mm_input_projection_weight",
        "model.multi_modal_projector.mm_soft_emb_norm.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ):
        assert canonical(other) is None, other


def test_other_files_beside_the_weights_are_left_alone(llama, build):
    safetensors.numpy.save_file({"wq": np.zeros(2)}, llama / "consolidated.safetensors")
    assert set(SafetensorsCheckpoint(llama).names) == set(build("llama").model.state_dict())


def test_files_without_an_index(sharded, build):
    path = sharded[0].parent
    (path / INDEX).unlink()
    assert set(SafetensorsCheckpoint(path).names) == set(build("llama").model.state_dict())


def test_the_config_is_read_without_the_weights(llama):
    (llama / WEIGHTS).unlink()
    checkpoint = SafetensorsCheckpoint(llama)
    assert checkpoint.hf_config["model_type"] == "llama"
    with pytest.raises(InputError, match=r"llama: no \*\.safetensors"):
        _ = checkpoint.names


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "not JSON"),
        (b'{"model_type": "llama"', "not JSON"),
        (b'{"model_type": "\xff\xfe"}', "not UTF-8"),
        (b'["llama"]', "not a JSON object"),
    ],
)
def test_a_bad_config_is_named(llama, content, reason):
    if content is None:
        (llama / "config.json").unlink()
    else:
        (llama / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.json: {reason}"):
        SafetensorsCheckpoint(llama)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_named(llama, kept):
    """Cut in the length of its header, in the header, and in the data."""
    content = (llama / WEIGHTS).read_bytes()
    size = int(kept * len(content)) if isinstance(kept, float) else kept
    (llama / WEIGHTS).write_bytes(content[:size])
    _assert_never_opens(llama, rf"{WEIGHTS}: not a whole safetensors file")


def test_a_file_with_an_absurd_header_is_named(llama):
    (llama / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    _assert_never_opens(llama, rf"{WEIGHTS}: not a whole safetensors file")


def test_a_missing_shard_is_named(sharded):
    sharded[1].unlink()
    _assert_never_opens(sharded[1].parent, rf"{sharded[1].name}: missing, .*index\.json")


def test_a_truncated_shard_is_named(sharded):
    sharded[2].write_bytes(sharded[2].read_bytes()[:-10])
    _assert_never_opens(sharded[2].parent, f"{sharded[2].name}: not a whole")


def test_a_tensor_in_two_shards_is_named(sharded):
    content = safetensors.numpy.load_file(sharded[-1])
    again = {"model.embed_tokens.weight": np.ones((106, 48))}
    safetensors.numpy.save_file(content | again, sharded[-1])
    message = rf"{sharded[-1].name}: tensor model\.embed_tokens\.weight is also in model-00001"
    _assert_never_opens(sharded[0].parent, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "weight_map is missing"),
        ({"weight_map": ["a"]}, "weight_map must be an object"),
        ({"weight_map": {"a": 3}}, "weight_map: a must be a string, not 3"),
        ({"weight_map": {"a": None}}, "weight_map: a is missing"),
        ({"weight_map": {"a": "../llama/model.safetensors"}}, "a lies in '../llama"),
        ({"weight_map": {"a": "sub/../../x.safetensors"}}, "a lies in 'sub/../.."),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "a lies in '/etc/x"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "a lies in "),
        ({"weight_map": {"a": ""}}, "a lies in "),
    ],
)
def test_a_bad_index_is_named(sharded, content, message):
    path = sharded[0].parent
    (path / INDEX).write_text(json.dumps(content))
    _assert_never_opens(path, rf"index\.json: {message}")


def _assert_never_opens(path: Path, message: str) -> None:
    """Neither the first time nor when a caller tries again."""
    checkpoint = SafetensorsCheckpoint(path)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            _ = checkpoint.names


def test_ids_that_end_a_text(llama):
    assert SafetensorsCheckpoint(llama).eos_ids == (2,)
    (llama / "generation_config.json").write_text('{"eos_token_id": [2, 7, 5]}')
    assert SafetensorsCheckpoint(llama).eos_ids == (2, 5, 7)
    (llama / "config.json").write_text('{"model_type": "llama", "eos_token_id": null}')
    (llama / "generation_config.json").unlink()
    (llama / "generation_config.json").symlink_to(llama / "lost.json")  # as caches lose files
    with pytest.raises(InputError, match=r"generation_config.json: no such file"):
        _ = SafetensorsCheckpoint(llama).eos_ids
    (llama / "generation_config.json").unlink()
    assert SafetensorsCheckpoint(llama).eos_ids == ()


def test_a_directory_without_a_tokenizer(llama):
    with pytest.raises(InputError, match="llama: no readable tokenizer"):
        SafetensorsCheckpoint(llama).tokenizer()


@pytest.mark.parametrize(
    ("dtype", "spelled"),
    [
        (torch.int8, "I8"),
        (torch.int64, "I64"),
        (torch.uint8, "U8"),
        (torch.uint16, "U16"),
        (torch.bool, "BOOL"),
        (torch.complex64, "C64"),
    ],
)
def test_weights_that_are_no_floating_point_numbers_are_named(llama, dtype, spelled):
    weights = safetensors.torch.load_file(llama / WEIGHTS)
    weights["model.norm.weight"] = torch.ones(48).to(dtype)
    safetensors.torch.save_file(weights, llama / WEIGHTS)
    message = rf"{WEIGHTS}: tensor model\.norm\.weight has dtype {spelled}, expected .*quantised"
    _assert_never_opens(llama, message)


def test_files_that_are_no_files(llama):
    (llama / WEIGHTS).unlink()
    (llama / WEIGHTS).mkdir()
    _assert_never_opens(llama, rf"{WEIGHTS}: not a regular file")
    (llama / WEIGHTS).rmdir()
    os.mkfifo(llama / WEIGHTS)  # would wait for somebody to write
    _assert_never_opens(llama, rf"{WEIGHTS}: not a regular file")
    (llama / "config.json").unlink()
    (llama / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json: not a regular file"):
        SafetensorsCheckpoint(llama)
    (llama / "config.json").rmdir()
    (llama / "config.json").symlink_to(llama / "config.json")
    with pytest.raises(InputError, match=r"config\.json: "):
        SafetensorsCheckpoint(llama)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (-1, "at least 0, not -1"),
        (True, "an integer, not True"),
        (2.5, "an integer, not 2.5"),
        ("2", "an integer, not '2'"),
        ([2, -7], "at least 0, not -7"),
        ([2, True], "int values, not True"),
        ([2, [3]], r"int values, not \[3\]"),
        ({"a": 2}, "an integer, not {'a': 2}"),
    ],
)
def test_ids_that_are_none_are_named(llama, file, ids, message):
    fields = json.loads((llama / file).read_text()) if (llama / file).exists() else {}
    (llama / file).write_text(json.dumps(fields | {"eos_token_id": ids}))
    with pytest.raises(InputError, match=rf"llama/{file}: eos_token_id must .*{message}"):
        _ = SafetensorsCheckpoint(llama).eos_ids
