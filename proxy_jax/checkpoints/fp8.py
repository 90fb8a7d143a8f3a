"""FP8 checkpoints: weights of 8-bit floats with scales, as DeepSeek, Qwen and others publish them.

A weight of float8_e4m3fn is multiplied by its scale: a number for the whole weight, for each of its
rows, or for each block of rows and columns. Only weights are read so; activations, which the
publishers' kernels round to 8 bits as well, keep their precision.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from proxy_jax.errors import InputError
from proxy_jax.reading import Fields, parse_json, reading, shown

DTYPE = "F8_E4M3"  # as safetensors spells it
UNREAD = "quantised weights other than FP8 with scales are not read; use the unquantised model"
_SCALES = ("_scale_inv", "_scale")  # behind a weight's name; both multiply, whatever they say
_ACTIVATION_SCALES = ("input_scale", "activation_scale")  # beside a weight; not needed
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

Block = tuple[int, int]


def read_block(hf_config: Mapping[str, Any], where: str) -> Block | None:
    """Reads what a config.json says about quantisation: the size of the blocks that have a scale.

    Args:
      hf_config: the parsed config.json.
      where: named in errors.

    Returns:
      Rows and columns of a block; None if the weights are not quantised, or not in blocks.

    Raises:
      InputError: weights that are quantised in another way than FP8.
    """
    config = Fields(where, hf_config)
    for holder in (config, config.inner("text_config")):
        for key in ("quantization_config", "compression_config"):
            settings = holder.inner(key) if holder else None
            if not settings or not settings.fields:
                continue
            method = settings.fields.get("quant_method")
            if method == "fp8":
                settings.choice("fmt", ("e4m3",), default="e4m3")
                return _pair(settings, "weight_block_size")
            if method == "compressed-tensors":
                return _compressed_block(settings)
            raise InputError(f"{settings.where}: quant_method is {shown(method)}; {UNREAD}")
    return None


def _compressed_block(settings: Fields) -> Block | None:
    groups, blocks = settings.inner("config_groups"), set()
    for name in groups.fields if groups else ():
        group = groups.inner(name) if groups else None
        weights = group.inner("weights") if group else None
        kind = weights and (weights.fields.get("type"), weights.fields.get("num_bits"))
        if not weights or kind != ("float", 8):
            raise InputError(f"{settings.where}: {name} is not of 8-bit floats; {UNREAD}")
        blocks.add(_pair(weights, "block_structure"))
    if settings.fields.get("format") != "float-quantized" or len(blocks) != 1:
        raise InputError(f"{settings.where}: not FP8 of one kind; {UNREAD}")
    return blocks.pop()


def _pair(settings: Fields, key: str) -> Block | None:
    sizes = settings.array(key, int, default=None)
    if sizes is not None and (len(sizes) != 2 or min(sizes) < 1):
        raise InputError(f"{settings.where}: {key} must be two sizes, not {shown(sizes)}")
    return sizes


def scale_name(weight: str, names: Collection[str]) -> str | None:
    """Finds the name of an FP8 weight's scale among those of a checkpoint's tensors."""
    return next((weight + ending for ending in _SCALES if weight + ending in names), None)


def activation_scales(weight: str) -> set[str]:
    """Names that the scales of a layer's inputs may have, which stand beside its weight's."""
    return {f"{weight.rpartition('.')[0]}.{ending}" for ending in _ACTIVATION_SCALES}


def dequantise(
    bits: np.ndarray,
    scale: np.ndarray,
    block: Block | None,
    index: tuple[slice, ...],
    where: str,
) -> np.ndarray:
    """Gives a part of a weight as float32.

    Args:
      bits: [rows, columns] uint8, the whole weight; only what is asked for is read.
      scale: of one number, [rows, 1], or one number a block.
      block: rows and columns of a block, if the checkpoint has blocks.
      index: a slice of each axis.
      where: names the tensor in errors.

    Raises:
      InputError: a weight that is no matrix, or a scale that does not fit it.
    """
    if bits.ndim != 2:
        raise InputError(f"{where}: FP8 of shape {bits.shape}, expected a matrix")
    rows, columns = bits.shape
    if scale.size == 1:
        block = rows, columns
    elif scale.shape == (rows, 1):
        block = 1, columns
    elif block is None or scale.shape != (-(-rows // block[0]), -(-columns // block[1])):
        raise InputError(
            f"{where}: its scale has shape {scale.shape}, expected one number, one a row"
            + (f", or one for each block of {block[0]} x {block[1]}" if block else "")
        )
    scale = scale.reshape(-(-rows // block[0]), -(-columns // block[1])).astype(np.float32)
    of_rows, of_columns = (
        np.arange(size)[cut] // side
        for size, cut, side in zip(bits.shape, index, block, strict=True)
    )
    values = _VALUES[bits[index]]
    values *= scale[np.ix_(of_rows, of_columns)]
    return values


class RawTensors:
    """The bytes of a safetensors file's tensors, for dtypes that NumPy has no name for.

    Args:
      file: one that safetensors has opened, so that its header is known to be whole.
    """

    def __init__(self, file: Path):
        with reading(file, "not a whole safetensors file"):
            self._bytes = np.memmap(file, np.uint8, mode="r")
            self._start = 8 + int.from_bytes(self._bytes[:8].tobytes(), "little")
            self._header = parse_json(self._bytes[8 : self._start].tobytes(), file)

    def read(self, name: str) -> np.ndarray:
        """Gives a tensor of one byte a number, as uint8. Stays on disk until it is indexed."""
        entry = self._header[name]
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        return self._bytes[begin:end].reshape(entry["shape"])
