"""Writes a trained expert to disk: a Hugging Face directory, and for LoRA a PEFT adapter as well.

Everything is written to a sibling directory and renamed when it is whole: what stands under the
asked name is complete.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError

from proxy_jax.checkpoints.adapters import save_adapter
from proxy_jax.checkpoints.safetensors import export, export_config
from proxy_jax.errors import InputError
from proxy_jax.jobs import files, processes
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params
from proxy_jax.models.hf_config import config_to_hf
from proxy_jax.models.lora import attach, is_adapted, merge

ADAPTER = "adapter"


@dataclasses.dataclass(frozen=True)
class Lora:
    """A trained adapter and its settings.

    Attributes:
      matrices: see `save_adapter`.
      rank: R.
      alpha: lora_alpha; the adapter's product is scaled by alpha / R.
      dropout: what it was trained with.
    """

    matrices: Any
    rank: int
    alpha: float
    dropout: float = 0.0


def check_export(path: Path, config: ModelConfig, *, lora: bool) -> None:
    """Refuses before training what `export_expert` would refuse after it.

    Raises:
      InputError: the path exists, or all weights are trained and config.json has no words for the
        architecture.
    """
    if path.exists():
        raise InputError(f"{path}: exists; export into another directory")
    if not lora:
        config_to_hf(config)


def export_expert(
    path: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Any,
    base: str,
    *,
    lora: Lora | None = None,
    dtype: str = "bfloat16",
    eos_ids: Sequence[int] = (),
) -> str:
    """Writes a trained expert so that transformers, peft and `ModelSpec` load it.

    The directory has the weights (an adapter is merged into them), config.json, the tokenizer and
    generation_config.json. With LoRA, path/adapter has the adapter by itself. A model whose rope
    config.json has no words for (some GGUF files) leaves only the adapter.

    In a run of several processes every one of them must call it; the first writes.

    Args:
      path: the directory; must not exist.
      config: the architecture.
      params: the model's weights, without adapters; sharded or not, layers stacked or not.
      tokenizer: the transformers tokenizer that the expert was trained with.
      base: path or hub id of the model that the training began from.
      lora: the adapter, if one was trained; params are then the base's weights.
      dtype: of the weights. The adapter keeps its own.
      eos_ids: ids that end a text, besides the tokenizer's.

    Returns:
      One line that says what was written, and what was not.

    Raises:
      InputError: see `check_export`; also a weight that the dtype does not hold, and a disk that is
        full or fails, with nothing left behind.
    """
    check_export(path, config, lora=lora is not None)
    unspoken = ""
    try:
        config_to_hf(config)
    except InputError as error:
        unspoken = str(error).removeprefix("export: ")
    # Collective: every process takes part, whether it writes or not.
    adapter = jax.tree.map(_on_host, lora.matrices) if lora else None
    weights = None if unspoken else _merged_on_host(params, lora, dtype)
    if processes.is_first():

        def write(directory: Path) -> None:
            if weights:
                export(config, weights, directory, tokenizer)
                _write_generation_config(directory, tokenizer, eos_ids)
            if lora:
                place = directory / ADAPTER
                save_adapter(place, config, adapter, lora.rank, lora.alpha, base, lora.dropout)

        _write_whole(path, write)
    if unspoken:
        return f"{path / ADAPTER}: the LoRA adapter only, not merged weights: {unspoken}"
    if lora:
        return f"{path}: merged weights, {dtype}; {path / ADAPTER}: the LoRA adapter"
    return f"{path}: weights, {dtype}"


def write_model(
    path: Path, config: ModelConfig, tokenizer: Any, eos_ids: Sequence[int], dtype: str
) -> None:
    """Writes what a model's weights need beside them: config.json, tokenizer, generation_config.

    Raises:
      InputError: as in `export_expert`.
    """

    def write(directory: Path) -> None:
        export_config(config, directory, dtype, tokenizer)
        _write_generation_config(directory, tokenizer, eos_ids)

    _write_whole(path, write)


def _merged_on_host(params: Params, lora: Lora | None, dtype: str) -> Params:
    """Unrolled arrays of NumPy; brought from the devices one layer and one tensor at a time."""
    if lora:
        params = attach(params, lora.matrices, lora.alpha / lora.rank)

    def weight(leaf: Any) -> np.ndarray:
        if is_adapted(leaf):
            # Rounded once, to the export's dtype and not to the base's before.
            leaf = merge(dataclasses.replace(leaf, weight=leaf.weight.astype(jnp.float32)))
        array = _on_host(leaf.astype(dtype))
        if not np.isfinite(array).all():
            raise InputError(f"export: a weight is not finite in {dtype}; use another export_dtype")
        return array

    def part(tree: Any) -> Any:
        return jax.tree.map(weight, tree, is_leaf=is_adapted)

    layers = params["layers"]
    if isinstance(layers, dict):
        count = len(jax.tree.leaves(layers)[0])
        unrolled = (jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count))
    else:
        unrolled = iter(layers)
    rest = {key: part(leaf) for key, leaf in params.items() if key != "layers"}
    return {**rest, "layers": tuple(part(layer) for layer in unrolled)}


def _on_host(array: jax.Array) -> np.ndarray:
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _write_generation_config(directory: Path, tokenizer: Any, eos_ids: Sequence[int]) -> None:
    """Chat models end a text with more ids than the one that config.json names."""
    ends = sorted({*eos_ids, tokenizer.eos_token_id} - {None})
    settings = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (directory / "generation_config.json").write_text(json.dumps(settings, indent=2))


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Has write(directory) fill what becomes path when it is whole and on disk."""
    try:
        files.make_directory(path, write)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot write ({error})") from error
