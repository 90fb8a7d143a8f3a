"""LoRA adapters: PEFT's directory format, and what a training run has saved."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from proxy_jax.checkpoints.names import Tensor, tensors
from proxy_jax.checkpoints.native import TrainedArrays, find_run
from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params
from proxy_jax.models.lora import attach
from proxy_jax.models.turned import Turned, turn
from proxy_jax.reading import read_json
from proxy_jax.sharding import Placement

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a config must say for the adapter to be scale * A B on linear layers, and nothing else.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "alora_invocation_tokens": (None,),
    # The others change the base model's weights, too.
    "init_lora_weights": (True, False, None, "gaussian"),
}


def with_adapter(
    params: Params,
    path: Path,
    config: ModelConfig,
    dtype: Any,
    place: Placement,
    *,
    turned: bool = False,
) -> Params:
    """Loads an adapter and puts it on a model's parameters.

    Args:
      params: of the base model, layers stacked or not; shared with the result, not copied.
      path: see `read_adapter`.
      config: the base model's.
      dtype: of the adapter's matrices.
      place: the mesh and rules.
      turned: whether its matrices are stored as in models/turned.py.

    Raises:
      InputError: an adapter of another kind or for another model; names the key or tensor.
    """
    layers, scale = read_adapter(path, config)
    layers = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), layers)
    if turned:
        layers = jax.tree_util.tree_map_with_path(_turned, layers)
    stacked = isinstance(params["layers"], dict)
    tree: Any = jax.tree.map(lambda *x: np.stack(x), *layers) if stacked else tuple(layers)
    # Small: every device holds all of it.
    tree = jax.tree.map(lambda x: jax.device_put(x, place.sharding((None,) * x.ndim)), tree)
    return attach(params, {"layers": tree}, scale)


def _turned(path: Sequence[Any], matrix: np.ndarray) -> Turned:
    return turn(matrix, matrix.ndim - 1 if path[-1].key == "a" else 1)


def read_adapter(path: Path, config: ModelConfig) -> tuple[list[dict[str, Any]], float]:
    """Reads and checks an adapter: its matrices by layer, as stored, and the scale alpha / R.

    Args:
      path: a directory with adapter_config.json and adapter_model.safetensors, or a LoRA run of
        train.sft (its latest checkpoint counts) or one of its checkpoints.
      config: the base model's.

    Raises:
      InputError: an adapter of another kind or for another model; names the key or tensor.
    """
    source = _open_run(path, config) or _open_peft(path)
    unread = set(source.names)
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    # The layers of a matrix in a row: a run may store them as one array.
    for tensor in sorted(lora_tensors(config, source.rank), key=lambda tensor: tensor.path[2:]):
        if tensor.name not in unread:
            continue
        unread.remove(tensor.name)
        array = source.read(tensor.name)
        if array.shape != tensor.source_shape:
            raise InputError(
                f"{path}: tensor {tensor.name} has shape {array.shape}, the model and rank "
                f"{source.rank} ask for {tensor.source_shape}"
            )
        _, layer, module, weight, matrix = tensor.path
        target = layers[int(layer)].setdefault(str(module), {}).setdefault(weight, {})
        target[matrix] = tensor.to_ours(array)
    if unread:
        raise InputError(f"{path}: tensor {min(unread)} adapts nothing in a {config.family} model")
    kinds = {jax.tree.structure(layer) for layer in layers}
    whole = all({"a", "b"} == set(pair) for m in layers[0].values() for pair in m.values())
    if len(kinds) != 1 or not layers[0] or not whole:
        raise InputError(f"{path}: the same matrices, A and B, must be adapted in every layer")
    return layers, source.scale


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where an adapter's matrices come from, under PEFT's names and in its layout."""

    names: Collection[str]
    read: Callable[[str], np.ndarray]
    rank: int
    scale: float


def _open_run(path: Path, config: ModelConfig) -> _Source | None:
    run = find_run(path)
    if run is None:
        return None
    if not run.rank:
        raise InputError(f"{path}: a run that trains all weights: a model, not an adapter")
    arrays = TrainedArrays(run.checkpoint, lora_tensors(config, run.rank))

    def read(name: str) -> np.ndarray:
        arrays.shape(name)  # refuses an array that does not fit
        return arrays.read(name)

    return _Source(arrays.names, read, run.rank, run.scale)


def _open_peft(path: Path) -> _Source:
    settings = _read_config(path)
    stored = _read_tensors(path / _WEIGHTS)
    scale = settings["lora_alpha"] / settings["r"]
    return _Source(stored, stored.__getitem__, settings["r"], scale)


def save_adapter(
    path: Path,
    config: ModelConfig,
    adapter: Any,
    rank: int,
    lora_alpha: float,
    base: str,
    dropout: float = 0.0,
) -> None:
    """Writes an adapter as PEFT does; `with_adapter` and PeftModel.from_pretrained read it.

    Args:
      path: the directory, created if need be.
      config: of the model that is adapted.
      adapter: {"layers": ...}, a tree like the model's params, layers stacked or not, that has
        {"a": [in..., R], "b": [R, out...]} in place of the adapted weights and nothing in place
        of the others. Stored in its own dtype.
      rank: R.
      lora_alpha: scale * R.
      base: path or hub id of the adapted model, for those who load the adapter by itself.
      dropout: what the adapter was trained with; told to those who train it further.

    Raises:
      InputError: the directory already holds an adapter, or the adapter does not fit the model or
        the rank; names the tensor.
    """
    if any((path / file).exists() for file in (_CONFIG, _WEIGHTS)):
        raise InputError(f"{path}: already holds an adapter; save into another directory")
    layers = adapter["layers"]
    stacked = isinstance(layers, dict)
    stored, modules = {}, set()
    for tensor in lora_tensors(config, rank):
        _, layer, module, weight, matrix = tensor.path
        pair = (layers if stacked else layers[layer]).get(module, {}).get(weight)
        if pair is None:
            continue
        array = np.asarray(pair[matrix][layer] if stacked else pair[matrix])
        sizes = dict(tensor.sizes)
        shape = tuple(sizes[letter] for letter in tensor.target)
        if array.shape != shape:
            raise InputError(
                f"{path}: tensor {tensor.name} has shape {array.shape}, the model and rank "
                f"{rank} ask for {shape}"
            )
        stored[tensor.name] = tensor.to_file(array)
        modules.add(tensor.name.split(".")[-3])  # ...self_attn.q_proj.lora_A.weight
    matrices = len(jax.tree.leaves(adapter)) * (config.num_layers if stacked else 1)
    if len(stored) != matrices or not stored:
        raise InputError(
            f"{path}: {len(stored)} of the adapter's {matrices} matrices belong to linear layers "
            f"of a {config.family} model, expected all"
        )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(stored, path / _WEIGHTS, metadata={"format": "pt"})
    (path / _CONFIG).write_text(json.dumps(settings, indent=2))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / _CONFIG
    settings = read_json(file)
    for key, allowed in _REQUIRED.items():
        if settings.get(key) not in allowed:
            raise InputError(f"{file}: {key}={settings.get(key)!r} is not supported")
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), (int, float)) or settings[key] <= 0:
            raise InputError(f"{file}: {key} must be a positive number")
    return settings


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({error})") from error


def lora_tensors(config: ModelConfig, rank: int) -> list[Tensor]:
    """A and B of every linear layer inside the blocks, as PEFT names them."""
    found = []
    for tensor in tensors(config):
        if tensor.path[0] != "layers" or len(tensor.source) != 2:
            continue
        out, into = tensor.source
        stem = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        sizes = (*tensor.sizes, ("R", rank))
        found += [
            Tensor(f"{stem}.lora_A.weight", (*tensor.path, "a"), ("R", into), f"{into}R", sizes),
            Tensor(f"{stem}.lora_B.weight", (*tensor.path, "b"), (out, "R"), f"R{out}", sizes),
        ]
    return found
