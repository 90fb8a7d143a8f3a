"""Hugging Face checkpoint directories: read lazily, slice by slice; written in shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from proxy_jax.checkpoints import fp8
from proxy_jax.checkpoints.names import Tensor, canonical, tensors
from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params
from proxy_jax.models.hf_config import config_to_hf
from proxy_jax.reading import Fields, read_json, reading
from proxy_jax.tokenization import open_tokenizer

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5 * 10**9
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsCheckpoint:
    """A directory with config.json and one or more safetensors files.

    Args:
      path: the directory.
      fetch: downloads the weights into it; called before they are first looked at.

    Attributes:
      path: the directory.
      hf_config: the parsed config.json.

    Raises:
      InputError: no config.json or no weights, a shard that is missing or damaged, a tensor that
        stands in two shards, or weights that are no floating-point numbers (FP8 with scales is).
    """

    def __init__(self, path: Path, fetch: Callable[[], object] | None = None):
        self.path = path
        self._fetch = fetch
        self.hf_config = read_json(path / "config.json")
        self._block = fp8.read_block(self.hf_config, str(path / "config.json"))
        self._files: dict[Path, Any] = {}
        self._raw: dict[Path, fp8.RawTensors] = {}  # of files that hold FP8
        self._where: dict[str, tuple[str, Path]] = {}  # our spelling -> (theirs, shard)
        self._scales: dict[str, str] = {}  # FP8 weight -> its scale
        self._names: tuple[str, ...] = ()

    def _open(self) -> dict[str, tuple[str, Path]]:
        # On first use: the config alone can be read without touching the weights.
        if self._where:
            return self._where
        where: dict[str, tuple[str, Path]] = {}
        for shard in self._shards():
            with reading(shard, "not a whole safetensors file"):
                self._files[shard] = safe_open(shard, framework="numpy")
                names = list(self._files[shard].keys())
            for stored in names:
                name = canonical(stored)
                if name is None:
                    continue
                if name in where:
                    raise InputError(f"{shard}: tensor {name} is also in {where[name][1].name}")
                where[name] = (stored, shard)
        dtypes = {name: self._slice(*found).get_dtype() for name, found in where.items()}
        scales, beside = {}, set()
        for name, dtype in dtypes.items():
            if dtype == fp8.DTYPE and (scale := fp8.scale_name(name, where)):
                scales[name] = scale
                beside |= {scale, *fp8.activation_scales(name)}
        for name, dtype in dtypes.items():
            if dtype not in _FLOATS and name not in scales and name not in beside:
                raise InputError(
                    f"{where[name][1]}: tensor {name} has dtype {dtype}, expected "
                    f"{', '.join(_FLOATS)}, or {fp8.DTYPE} with a scale: {fp8.UNREAD}"
                )
        self._scales, self._names = scales, tuple(name for name in where if name not in beside)
        self._where = where
        return where

    def _slice(self, stored: str, shard: Path) -> Any:
        return self._files[shard].get_slice(stored)

    @property
    def at_hand(self) -> bool:
        """Whether the weights are on disk, or have to be downloaded first."""
        return self._fetch is None

    def _shards(self) -> list[Path]:
        if self._fetch is not None:
            self._fetch()
            self._fetch = None
        # The order of transformers: other *.safetensors beside these are copies in other formats.
        whole, index = self.path / _WHOLE, self.path / _INDEX
        with reading(self.path):
            if whole.exists():
                shards = [whole]
            elif index.exists():
                shards = _listed(index)
            else:
                shards = sorted(self.path.glob("*.safetensors"))
            if not shards:
                raise InputError(f"{self.path}: no *.safetensors files")
            for shard in shards:
                if not shard.exists():
                    raise InputError(f"{shard}: missing, although {_INDEX} names it")
                if not shard.is_file():
                    raise InputError(f"{shard}: not a regular file")
        return shards

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors a decoder may need."""
        self._open()
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slice(*self._open()[name]).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor, in its stored dtype; of one in FP8, its values in float32.

        Raises:
          InputError: it cannot be read, or its scale does not fit it; names file and tensor.
        """
        stored, shard = self._open()[name]
        with reading(f"{shard}: tensor {name}"):
            if name not in self._scales:
                return self._slice(stored, shard)[index]
            scale = self._scale(self._scales[name])
            return fp8.dequantise(
                self._bytes(stored, shard), scale, self._block, index, f"{shard}: tensor {name}"
            )

    def _scale(self, name: str) -> np.ndarray:
        stored, shard = self._where[name]
        dtype = self._slice(stored, shard).get_dtype()
        if dtype == "F8_E8M0":  # powers of 2
            return self._bytes(stored, shard).view(ml_dtypes.float8_e8m0fnu)
        if dtype not in _FLOATS:
            raise InputError(f"{shard}: tensor {name} has dtype {dtype}, which no scale has")
        return self._files[shard].get_tensor(stored)

    def _bytes(self, stored: str, shard: Path) -> np.ndarray:
        if shard not in self._raw:
            self._raw[shard] = fp8.RawTensors(shard)
        return self._raw[shard].read(stored)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text; generation_config.json may name more than config.json does."""
        generation = self.path / "generation_config.json"
        ends = _end_ids(Fields(str(self.path / "config.json"), self.hf_config))
        if generation.exists() or generation.is_symlink():  # a link to nothing is damage
            ends |= _end_ids(Fields(str(generation), read_json(generation)))
        return tuple(sorted(ends))

    def tokenizer(self) -> Any:
        """The directory's tokenizer."""
        return open_tokenizer(self.path)


def _listed(index: Path) -> list[Path]:
    """The files that an index names."""
    files = Fields(str(index), read_json(index)).inner("weight_map")
    if files is None:
        raise InputError(f"{index}: weight_map is missing")
    for name in files.fields:
        file = PurePath(files.string(name))
        if file.is_absolute() or ".." in file.parts or not file.name or "\0" in file.name:
            raise InputError(f"{index}: {name} lies in {str(file)!r}, expected a file beside it")
    return sorted({index.parent / file for file in files.fields.values()})


def _end_ids(config: Fields) -> set[int]:
    if not isinstance(config.fields.get("eos_token_id"), list):
        end = config.integer("eos_token_id", 0, default=None)
        return set() if end is None else {end}
    ids = set(config.array("eos_token_id", int))
    if ids and min(ids) < 0:
        raise InputError(f"{config.where}: eos_token_id must be at least 0, not {min(ids)}")
    return ids


def export(config: ModelConfig, params: Params, path: Path, tokenizer: Any = None) -> None:
    """Writes a directory that transformers loads as the same model.

    Args:
      config: the architecture.
      params: unrolled parameters, in the dtype to store.
      path: created if need be.
      tokenizer: a transformers tokenizer, saved beside the weights.

    Raises:
      InputError: the directory already holds weights.
    """
    path.mkdir(parents=True, exist_ok=True)
    if any(path.glob("*.safetensors")):
        raise InputError(f"{path}: already holds weights; export into another directory")
    itemsize = params["embedding"].dtype.itemsize
    shards = _into_shards(tensors(config), itemsize)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [_WHOLE]
    for file, shard in zip(files, shards, strict=True):
        arrays = {tensor.name: tensor.to_file(_leaf(params, tensor.path)) for tensor in shard}
        save_file(arrays, path / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {t.name: file for file, shard in zip(files, shards, strict=True) for t in shard}
        size = sum(math.prod(t.source_shape) * itemsize for shard in shards for t in shard)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (path / _INDEX).write_text(json.dumps(index, indent=2))
    export_config(config, path, str(params["embedding"].dtype), tokenizer)


def export_config(config: ModelConfig, path: Path, dtype: str, tokenizer: Any = None) -> None:
    """Writes config.json, and a tokenizer beside it.

    Args:
      config: the architecture.
      path: an existing directory.
      dtype: of the weights that belong to it.
      tokenizer: a transformers tokenizer.

    Raises:
      InputError: an architecture that config.json has no words for.
    """
    hf = config_to_hf(config) | {"torch_dtype": dtype}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # None too is written: transformers would take the ids of the family's first release.
        hf[key] = getattr(tokenizer, key, None)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(hf, indent=2))


def _into_shards(table: list[Tensor], itemsize: int) -> list[list[Tensor]]:
    """Consecutive tensors, as many as fit in each file."""
    shards: list[list[Tensor]] = [[]]
    room = _SHARD_BYTES
    for tensor in table:
        size = math.prod(tensor.source_shape) * itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(tensor)
        room -= size
    return shards


def _leaf(params: Any, path: tuple[str | int, ...]) -> np.ndarray:
    for key in path:
        params = params[key]
    return np.asarray(params)
