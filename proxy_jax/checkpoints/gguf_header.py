"""The header of a GGUF file: metadata, and where each tensor lies.

Parsed here and not by ``gguf.GGUFReader``: that builds one array object per string, which takes 7 s
and 700 MB for a vocabulary of 150,000 tokens. Type sizes are the ``gguf`` package's.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from proxy_jax.errors import InputError

_SUPPORTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# struct codes of GGUFValueType 0-7 and 10-12; the two between are strings and arrays.
_SCALAR_CODES = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))


class Metadata(dict[str, Any]):
    """Metadata of one GGUF file; ``metadata[key]`` raises InputError when the key is missing."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.path}: metadata key {key!r} is missing")


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
    raw_infos = []
    try:
        for _ in range(key_count):
            key = cursor.text()
            metadata[key] = cursor.value()
        for _ in range(tensor_count):
            name = cursor.text()
            # ggml lists the fastest dimension first, Hugging Face last.
            dims = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
            raw_infos.append((name, dims, cursor.number("I"), cursor.number("Q")))
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise InputError(
            f"{path}: the header is damaged or truncated near byte {cursor.at} ({error})"
        ) from error
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    data_start = -(-cursor.at // alignment) * alignment
    return metadata, [
        _checked(path, data.size, name, dims, kind, data_start + offset)
        for name, dims, kind, offset in raw_infos
    ]


def _checked(
    path: Path, file_size: int, name: str, shape: tuple[int, ...], kind_number: int, start: int
) -> StoredTensor:
    kind = {kind.value: kind for kind in GGMLQuantizationType}.get(kind_number)
    if kind is None or kind.name not in _SUPPORTED:
        raise InputError(
            f"{path}: tensor {name!r} has type {kind.name if kind else kind_number},"
            f" expected one of {', '.join(_SUPPORTED)}"
        )
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise InputError(
            f"{path}: tensor {name!r} has rows of {shape[-1]} values,"
            f" expected a multiple of {block} for type {kind.name}"
        )
    nbytes = int(np.prod(shape, dtype=object)) // block * block_bytes
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
            raise ValueError("string beyond the end of the file")
        self.at += size
        return str(raw, "utf-8")

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
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        dtype = np.dtype("<" + _SCALAR_CODES[kind])
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values.tolist()
