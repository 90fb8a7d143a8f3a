"""The header of a GGUF file: metadata, and where each tensor lies.

Parsed here and not by ``gguf.GGUFReader``: that builds one array object per string, which takes 7 s
and 700 MB for a vocabulary of 150,000 tokens. Type sizes are the ``gguf`` package's.
"""

import itertools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from proxy_jax.errors import InputError
from proxy_jax.reading import CheckedFields, reading

_SUPPORTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
# struct codes of GGUFValueType 0-7 and 10-12; the two between are strings and arrays.
_SCALAR_CODES = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))


class Metadata(dict[str, Any], CheckedFields):
    """Metadata of one GGUF file, by key; the getters check types and ranges."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.where = str(path)
        self.fields = self


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file: its bytes start at `start`; `shape` is in HF's order."""

    gguf_name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    nbytes: int


def read_header(path: Path, data: np.ndarray) -> tuple[Metadata, list[StoredTensor]]:
    """Parses the metadata and the list of tensors.

    Args:
      path: named in errors.
      data: the bytes of the whole file, uint8.

    Raises:
      InputError: not a GGUF file, a damaged or truncated one, or an unknown tensor type.
    """
    if bytes(data[:4]) != b"GGUF" or data.size < 24:
        raise InputError(f"{path}: not a GGUF file (it does not start like one)")
    version, tensor_count, key_count = struct.unpack_from("<IQQ", data.data, 4)
    if version not in _VERSIONS:
        raise InputError(
            f"{path}: GGUF version {version}, expected a little-endian file of version"
            f" {' or '.join(map(str, _VERSIONS))}"
        )
    cursor = _Cursor(data, 24)
    metadata = Metadata(path)
    raw_infos = {}
    with reading(path, "the header is damaged or truncated"):
        for _ in range(key_count):
            key = cursor.text()
            if key in metadata:
                raise InputError(f"{path}: metadata key {key!r} stands there twice")
            metadata[key] = cursor.value()
        for _ in range(tensor_count):
            name = cursor.text()
            if name in raw_infos:
                raise InputError(f"{path}: tensor {name!r} stands there twice")
            raw_infos[name] = cursor.dimensions(), cursor.number("I"), cursor.number("Q")
    alignment = metadata.integer("general.alignment", 1, default=_DEFAULT_ALIGNMENT)
    if alignment & (alignment - 1):
        raise InputError(f"{path}: general.alignment must be a power of 2, not {alignment}")
    data_start = -(-cursor.at // alignment) * alignment
    tensors = [
        _checked(path, data.size, name, dims, kind, data_start + offset)
        for name, (dims, kind, offset) in raw_infos.items()
    ]
    in_order = sorted(tensors, key=lambda tensor: tensor.start)
    for before, tensor in itertools.pairwise(in_order):
        if tensor.start < before.start + before.nbytes:
            raise InputError(
                f"{path}: tensors {before.gguf_name!r} and {tensor.gguf_name!r} overlap"
            )
    return metadata, tensors


def _checked(
    path: Path, file_size: int, name: str, shape: tuple[int, ...], kind_number: int, start: int
) -> StoredTensor:
    kind = {kind.value: kind for kind in GGMLQuantizationType}.get(kind_number)
    if kind is None or kind.name not in _SUPPORTED:
        raise InputError(
            f"{path}: tensor {name!r} has type {kind.name if kind else kind_number},"
            f" expected one of {', '.join(_SUPPORTED)}"
        )
    if not 1 <= len(shape) <= _MOST_DIMENSIONS or 0 in shape:
        raise InputError(
            f"{path}: tensor {name!r} has shape {shape}, expected 1 to 4 sizes above 0"
        )
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise InputError(
            f"{path}: tensor {name!r} has rows of {shape[-1]} values,"
            f" expected a multiple of {block} for type {kind.name}"
        )
    nbytes = math.prod(shape) // block * block_bytes
    if start + nbytes > file_size:
        raise InputError(
            f"{path}: truncated file: tensor {name!r} ends at byte {start + nbytes},"
            f" but the file has {file_size} bytes"
        )
    return StoredTensor(name, shape, kind, start, nbytes)


class _Cursor:
    """Reads the little-endian values of a header one after the other."""

    def __init__(self, data: np.ndarray, at: int):
        self.data = data.data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size = self.number("Q")
        raw = self.data[self.at : self.at + size]
        if len(raw) < size:
            raise ValueError(f"a string of {size} bytes at byte {self.at}")
        self.at += size
        return str(raw, "utf-8")

    def dimensions(self) -> tuple[int, ...]:
        count = self.number("I")
        if count > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {count} dimensions at byte {self.at}")
        # ggml lists the fastest dimension first, Hugging Face last.
        return tuple(self.number("Q") for _ in range(count))[::-1]

    def value(self) -> Any:
        kind = GGUFValueType(self.number("I"))
        if kind == GGUFValueType.ARRAY:
            return self._array()
        if kind == GGUFValueType.STRING:
            return self.text()
        value = self.number(_SCALAR_CODES[kind])
        if kind == GGUFValueType.FLOAT32:
            # The shortest decimal with this float32 value: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(value)))
        return value

    def _array(self) -> list[Any]:
        kind = GGUFValueType(self.number("I"))
        count = self.number("Q")
        if kind == GGUFValueType.ARRAY:
            raise ValueError(f"an array of arrays at byte {self.at}")
        strings = kind == GGUFValueType.STRING  # a string begins with its length, a uint64
        dtype = np.dtype("<Q" if strings else "<" + _SCALAR_CODES[kind])
        if count * dtype.itemsize > len(self.data) - self.at:
            raise ValueError(f"an array of {count} values at byte {self.at}")
        if strings:
            return [self.text() for _ in range(count)]
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values.tolist()
