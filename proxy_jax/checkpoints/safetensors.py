"""Hugging Face checkpoint directories: read lazily, slice by slice; written in shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from proxy_jax.checkpoints.names import Tensor, canonical, tensors
from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params
from proxy_jax.models.hf_config import config_to_hf
from proxy_jax.reading import read_json
from proxy_jax.tokenization import open_tokenizer

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5 * 10**9


class SafetensorsCheckpoint:
    """A directory with config.json and one or more safetensors files.

    Args:
      path: the directory.
      fetch: downloads the weights into it; called before they are first looked at.

    Attributes:
      path: the directory.
      hf_config: the parsed config.json.

    Raises:
      InputError: no config.json or no weights, a shard that is missing or damaged, or a tensor
        that stands in two shards.
    """

    def __init__(self, path: Path, fetch: Callable[[], object] | None = None):
        self.path = path
        self._fetch = fetch
        self.hf_config = read_json(path / "config.json")
        self._files: dict[Path, Any] = {}
        self._where: dict[str, tuple[str, Path]] = {}  # our spelling -> (theirs, shard)

    def _open(self) -> dict[str, tuple[str, Path]]:
        # On first use: the config alone can be read without touching the weights.
        if self._where:
            return self._where
        where: dict[str, tuple[str, Path]] = {}
        for shard in self._shards():
            try:
                self._files[shard] = safe_open(shard, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{shard}: not a whole safetensors file ({error})") from error
            for stored in self._files[shard].keys():  # noqa: SIM118 (not a mapping)
                name = canonical(stored)
                if name is None:
                    continue
                if name in where:
                    raise InputError(f"{shard}: tensor {name} is also in {where[name][1].name}")
                where[name] = (stored, shard)
        self._where = where
        return where

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
        if whole.exists():
            return [whole]
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{index}: weight_map is missing")
            shards = sorted({self.path / file for file in weight_map.values()})
        else:
            shards = sorted(self.path.glob("*.safetensors"))
        if not shards:
            raise InputError(f"{self.path}: no *.safetensors files")
        for shard in shards:
            if not shard.exists():
                raise InputError(f"{shard}: missing, although {_INDEX} names it")
        return shards

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors a decoder may need."""
        return tuple(self._open())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        stored, shard = self._open()[name]
        return tuple(self._files[shard].get_slice(stored).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor, in its stored dtype."""
        stored, shard = self._open()[name]
        try:
            return self._files[shard].get_slice(stored)[index]
        except SafetensorError as error:
            raise InputError(f"{shard}: tensor {name} cannot be read ({error})") from error

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text; generation_config.json may name more than config.json does."""
        generation = self.path / "generation_config.json"
        configs = [self.hf_config] + ([read_json(generation)] if generation.exists() else [])
        found: set[int] = set()
        for config in configs:
            named = config.get("eos_token_id")
            if named is not None:
                found |= set(named if isinstance(named, list) else [named])
        return tuple(sorted(found))

    def tokenizer(self) -> Any:
        """The directory's tokenizer."""
        return open_tokenizer(self.path)


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
