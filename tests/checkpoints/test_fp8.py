"""FP8 checkpoints: the numbers of transformers and torch, in parts too; others are refused."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from proxy_jax.checkpoints.loading import load_params, model_config
from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint, export
from proxy_jax.errors import InputError
from proxy_jax.sharding import Placement, make_mesh
from tests.models.families import torch_model

ONE = Placement(make_mesh({"data": 1}))
EIGHT = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
UP = "model.layers.1.mlp.up_proj.weight"  # [76, 48]


def grid(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[rows, columns, ...] of blocks, filled up with zeros."""
    rows, columns = (-(-size // side) for size, side in zip(weight.shape, block, strict=True))
    filled = torch.zeros(rows * block[0], columns * block[1])
    filled[: weight.shape[0], : weight.shape[1]] = weight
    return filled.reshape(rows, block[0], columns, block[1]).transpose(1, 2)


def quantised(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in FP8 and one scale a block."""
    scale = grid(weight, block).abs().amax((2, 3)) / 448
    return (weight / spread(scale, block, weight)).to(torch.float8_e4m3fn), scale


def spread(scale: torch.Tensor, block: tuple[int, int], weight: torch.Tensor) -> torch.Tensor:
    whole = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[: weight.shape[0], : weight.shape[1]]


def write(
    path: Path, block: tuple[int, int], settings: Any, ending: str, name: str = "qwen3"
) -> dict[str, np.ndarray]:
    """Writes a tiny model with its matrices in FP8, and gives the weights as torch reads them."""
    torch_model(name).save_pretrained(path)
    stored: dict[str, torch.Tensor] = {}
    expected = {}
    for key, weight in load_file(path / "model.safetensors").items():
        if not key.endswith("proj.weight"):
            stored[key], expected[key] = weight, weight.numpy()
            continue
        side = block[0] or weight.shape[0], block[1] or weight.shape[1]
        values, scale = quantised(weight, side)
        stored[key] = values
        stored[key + ending] = scale if scale.numel() > 1 else scale.reshape(())
        expected[key] = (values.float() * spread(scale, side, weight)).numpy()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    configure(path, quantization_config=settings)
    return expected


def configure(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [4, 2],
}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}
    },
}


def test_blocks_are_read_as_transformers_reads_them(tmp_path):
    write(tmp_path, (4, 2), BLOCKS, "_scale_inv")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(4, 2)),
        dtype=torch.float32,
    )
    checkpoint = SafetensorsCheckpoint(tmp_path)
    state = model.state_dict()
    assert set(checkpoint.names) == set(state)
    for name, weight in state.items():
        values = checkpoint.read(name, (slice(None),) * weight.ndim)
        np.testing.assert_array_equal(values, weight.numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("block", "settings", "ending"),
    [
        ((5, 7), BLOCKS | {"weight_block_size": [5, 7]}, "_scale_inv"),  # divides no size
        ((128, 128), BLOCKS | {"weight_block_size": [128, 128]}, "_scale_inv"),
        ((0, 0), {"quant_method": "fp8", "activation_scheme": "static"}, "_scale"),
        ((1, 0), COMPRESSED, "_scale"),
    ],
    ids=["ragged blocks", "one block", "a number", "rows"],
)
def test_scales_of_every_kind(tmp_path, block, settings, ending):
    expected = write(tmp_path, block, settings, ending)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.names) == set(expected)
    for name, weight in expected.items():
        values = checkpoint.read(name, (slice(None),) * weight.ndim)
        np.testing.assert_array_equal(values, weight, err_msg=name)
    for part in [(slice(3, 41), slice(0, 48)), (slice(0, 76), slice(11, 12)), (slice(7, 7),) * 2]:
        np.testing.assert_array_equal(checkpoint.read(UP, part), expected[UP][part])


def test_loaded_in_parts_and_exported_as_plain_weights(tmp_path):
    expected = write(tmp_path / "fp8", (5, 7), BLOCKS | {"weight_block_size": [5, 7]}, "_scale_inv")
    checkpoint = SafetensorsCheckpoint(tmp_path / "fp8")
    config = model_config(checkpoint)
    whole = load_params([checkpoint], config, np.float32, ONE, stacked=False)
    parts = load_params([checkpoint], config, np.float32, EIGHT, stacked=False)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    np.testing.assert_array_equal(whole["layers"][1]["mlp"]["up"], expected[UP].T)
    short = load_params([checkpoint], config, "bfloat16", ONE, stacked=False)
    up = np.asarray(short["layers"][1]["mlp"]["up"], np.float32)
    np.testing.assert_array_equal(up, torch.tensor(expected[UP].T).bfloat16().float())
    export(config, whole, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    np.testing.assert_array_equal(model.state_dict()[UP].numpy(), expected[UP])


def test_scales_of_activations_are_left_alone(tmp_path):
    expected = write(tmp_path, (0, 0), {"quant_method": "fp8"}, "_scale")
    stored = load_file(tmp_path / "model.safetensors")
    stored[UP.replace("weight", "input_scale")] = torch.tensor(0.5)
    save_file(stored, tmp_path / "model.safetensors")
    assert set(SafetensorsCheckpoint(tmp_path).names) == set(expected)


def test_scales_that_are_powers_of_two(tmp_path):
    write(tmp_path, (4, 2), BLOCKS, "_scale_inv")
    stored = load_file(tmp_path / "model.safetensors")
    scale = stored[UP + "_scale_inv"].to(torch.float8_e8m0fnu)
    stored[UP + "_scale_inv"] = scale
    save_file(stored, tmp_path / "model.safetensors")
    values = SafetensorsCheckpoint(tmp_path).read(UP, (slice(None),) * 2)
    weight = stored[UP].float()
    np.testing.assert_array_equal(values, weight * spread(scale.float(), (4, 2), weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(UP + "_scale_inv"), f"{UP} has dtype F8_E4M3, expected .* with a scale"),
        (lambda w: w.update({UP + "_scale_inv": torch.ones(3, 3)}), f"{UP}: its scale has shape"),
        (
            lambda w: w.update({UP + "_scale_inv": torch.ones(19, 24, dtype=torch.int32)}),
            f"{UP}_scale_inv has dtype I32",
        ),
        (lambda w: w.update({UP + "_scale": torch.ones(())}), f"tensor {UP}_scale is not part of"),
        (
            lambda w: w.update({UP: w[UP].view(torch.uint8).view(torch.float8_e5m2)}),
            f"{UP} has dtype F8_E5M2",
        ),
    ],
    ids=["absent", "shape", "integers", "two", "another format"],
)
def test_scales_that_do_not_fit_are_named(tmp_path, change, message):
    write(tmp_path, (4, 2), BLOCKS, "_scale_inv")
    stored = load_file(tmp_path / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with pytest.raises(InputError, match=message):
        load_params([checkpoint], model_config(checkpoint), np.float32, ONE, stacked=False)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"load_in_8bit": True}, "None"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"quant_method": ["fp8"]}, r"\['fp8'\]"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "FP8"),
        (COMPRESSED | {"config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}}, "g "),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "FP8"),
        (COMPRESSED | {"config_groups": {"g": None}}, "g "),
    ],
)
@pytest.mark.parametrize("place", ["outer", "text_config"])
def test_other_quantisations_are_refused(tmp_path, settings, named, place):
    hf = {"model_type": "llama", "quantization_config": settings}
    (tmp_path / "config.json").write_text(
        json.dumps(hf if place == "outer" else {"text_config": hf})
    )
    with pytest.raises(InputError, match=rf"config\.json: .*{named}.*quantised") as caught:
        SafetensorsCheckpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_block_size": [128]}, "weight_block_size must be two sizes"),
        ({"weight_block_size": [0, 4]}, "weight_block_size must be two sizes"),
        ({"weight_block_size": ["4", 4]}, "weight_block_size must hold int"),
        ({"fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
    ],
)
def test_settings_of_fp8_are_checked(tmp_path, settings, message):
    hf = {"quantization_config": {"quant_method": "fp8"} | settings}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(InputError, match=rf"quantization_config: {message}"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": "fp8"}')
    with pytest.raises(InputError, match="quantization_config must be an object"):
        SafetensorsCheckpoint(tmp_path)
