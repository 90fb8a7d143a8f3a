"""LoRA adapters: PEFT's directory format, and what a training run has saved."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from proxy_jax.checkpoints.names import Tensor, canonical, tensors
from proxy_jax.checkpoints.native import TrainedArrays, find_run
from proxy_jax.checkpoints.peft_config import read_settings
from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params
from proxy_jax.models.lora import attach
from proxy_jax.models.turned import Turned, turn
from proxy_jax.reading import reading
from proxy_jax.sharding import Placement

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX, _MODEL = "base_model.model.", "model."  # before names: PEFT's, a causal decoder's own
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Matrices:
    """What an adapter adds to one weight: scale * A B.

    Attributes:
      a: [in..., R].
      b: [R, out...].
      scale: a number.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    def widened(self, rank: int) -> Matrices:
        """Gives the same product at a larger rank, by zeros."""
        more = [(0, rank - self.a.shape[-1])]
        a = np.pad(self.a, [(0, 0)] * (self.a.ndim - 1) + more)
        return Matrices(a, np.pad(self.b, more + [(0, 0)] * (self.b.ndim - 1)), self.scale)

    def scaled(self) -> Matrices:
        """Gives the same product at scale 1: B takes the scale, in float32."""
        return Matrices(self.a, self.b.astype(np.float32) * np.float32(self.scale), 1.0)


Layer: TypeAlias = dict[str, dict[str, Matrices]]  # by part of the block, and weight


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
    return put_adapter(params, read_adapter(path, config), dtype, place, turned=turned)


def put_adapter(
    params: Params, layers: list[Layer], dtype: Any, place: Placement, *, turned: bool = False
) -> Params:
    """Puts an adapter on a model's parameters.

    Args:
      params, dtype, place, turned: as in `with_adapter`.
      layers: the matrices of each layer.
    """
    stacked = isinstance(params["layers"], dict)
    if stacked:
        layers = _alike(layers)
    pairs = jax.tree.map(lambda m: {"a": m.a, "b": m.b}, layers)
    scales = jax.tree.map(lambda m: m.scale, layers)
    pairs = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), pairs)
    if turned:
        pairs = jax.tree_util.tree_map_with_path(_turned, pairs)
    tree: Any = jax.tree.map(lambda *x: np.stack(x), *pairs) if stacked else tuple(pairs)
    # Small: every device holds all of it.
    tree = jax.tree.map(lambda x: jax.device_put(x, place.sharding((None,) * x.ndim)), tree)
    of_layers = scales[0] if stacked else tuple(scales)
    return attach(params, {"layers": tree}, {"layers": of_layers})


def _alike(layers: Sequence[Layer]) -> list[Layer]:
    """Gives all layers matrices for the same weights, of one rank and scale, to be stacked.

    What a layer does not adapt is zero there, and a smaller rank is filled up with zeros. Scales
    that differ between layers go into B.
    """
    places = {(part, name) for layer in layers for part in layer for name in layer[part]}
    alike: list[Layer] = [{} for _ in layers]
    for part, name in sorted(places):
        adapted = [layer.get(part, {}).get(name) for layer in layers]
        present = [matrices for matrices in adapted if matrices]
        rank = max(matrices.a.shape[-1] for matrices in present)
        one_scale = len({matrices.scale for matrices in present}) == 1
        first = present[0]
        nothing = Matrices(np.zeros_like(first.a), np.zeros_like(first.b), first.scale)
        for layer, matrices in zip(alike, adapted, strict=True):
            wide = (matrices or nothing).widened(rank)
            layer.setdefault(part, {})[name] = wide if one_scale else wide.scaled()
    return alike


def _turned(path: Sequence[Any], matrix: np.ndarray) -> Turned:
    return turn(matrix, matrix.ndim - 1 if path[-1].key == "a" else 1)


def read_adapter(path: Path, config: ModelConfig) -> list[Layer]:
    """Reads and checks an adapter: the matrices of each layer, as stored.

    Args:
      path: a directory with adapter_config.json and adapter_model.safetensors, or a LoRA run of
        train.sft (its latest checkpoint counts) or one of its checkpoints.
      config: the base model's.

    Raises:
      InputError: an adapter of another kind or for another model; names the key or tensor.
    """
    source = _open_run(path, config) or _open_peft(path)
    weights = {weight.name.removesuffix(".weight"): weight for weight in _linear_weights(config)}
    pairs = {module: _pair(weights[module], source.rank(module)) for module in weights}
    arrays = _read_matrices(path, source, [t for pair in pairs.values() for t in pair], config)
    layers: list[Layer] = [{} for _ in range(config.num_layers)]
    for module, pair in pairs.items():
        _check_pair(path, source, module, pair)
        a, b = (arrays.get(tensor.name) for tensor in pair)
        if a is not None and b is not None:
            _, layer, part, name = weights[module].path
            matrices = Matrices(a, b, source.scale(module))
            layers[int(layer)].setdefault(str(part), {})[str(name)] = matrices
    if not arrays:
        raise InputError(f"{path}: adapts no layer of the model")
    return layers


def _read_matrices(
    path: Path, source: _Source, table: Sequence[Tensor], config: ModelConfig
) -> dict[str, np.ndarray]:
    """The matrices that are there, in our layout, by name."""
    if unknown := sorted(set(source.names) - {tensor.name for tensor in table}):
        what = "adapts nothing" if ".lora_" in unknown[0] else "is no A or B of LoRA"
        raise InputError(
            f"{path}: tensor {source.names[unknown[0]]} {what} that is supported: linear layers "
            f"in the blocks of a {config.family} model"
        )
    arrays = {}
    # The layers of a matrix in a row: a run may store them as one array.
    for tensor in sorted(table, key=lambda tensor: tensor.path[2:]):
        if tensor.name not in source.names:
            continue
        array = source.read(tensor.name)
        if array.shape != tensor.source_shape:
            raise InputError(
                f"{path}: tensor {source.names[tensor.name]} has shape {array.shape}, the model "
                f"and rank {dict(tensor.sizes)['R']} ask for {tensor.source_shape}"
            )
        arrays[tensor.name] = tensor.to_ours(array)
    return arrays


def _check_pair(path: Path, source: _Source, module: str, pair: tuple[Tensor, Tensor]) -> None:
    """Compares the matrices of a module that are there with those that should be."""
    stored = [tensor.name for tensor in pair if tensor.name in source.names]
    missing = [tensor.name for tensor in pair if tensor.name not in source.names]
    if source.targets(module) and missing:
        raise InputError(f"{path}: tensor {missing[0]} is missing, {source.expectation}")
    if not source.targets(module) and stored:
        raise InputError(
            f"{path}: tensor {source.names[stored[0]]} is there, but {_CONFIG} does not target its "
            "module"
        )


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where an adapter's matrices come from, under PEFT's names and in its layout.

    Attributes:
      names: of the matrices; for each one, how it is spelled where it is stored.
      read: gives a matrix, by its name.
      rank, scale: of a module's matrices, by the module's name in the model.
      targets: whether a module must have matrices.
      expectation: why, as an error says it.
    """

    names: Mapping[str, str]
    read: Callable[[str], np.ndarray]
    rank: Callable[[str], int]
    scale: Callable[[str], float]
    targets: Callable[[str], bool]
    expectation: str


def _open_run(path: Path, config: ModelConfig) -> _Source | None:
    run = find_run(path)
    if run is None:
        return None
    if not run.rank:
        raise InputError(f"{path}: a run that trains all weights: a model, not an adapter")
    rank, scale = run.rank, run.scale
    arrays = TrainedArrays(run.checkpoint, lora_tensors(config, rank))

    def read(name: str) -> np.ndarray:
        arrays.shape(name)  # refuses an array that does not fit
        return arrays.read(name)

    names = {name: name for name in arrays.names}
    kinds = {name.split(".lora_")[0].split(".")[-1] for name in names}  # q_proj, ...
    return _Source(
        names,
        read,
        rank=lambda module: rank,
        scale=lambda module: scale,
        targets=lambda module: module.split(".")[-1] in kinds,
        expectation="and the same must be adapted in every layer",
    )


def _open_peft(path: Path) -> _Source:
    file = path / _CONFIG
    settings = read_settings(file)
    stored = _read_tensors(path)
    names: dict[str, str] = {}
    for spelled in stored:
        name = _name(spelled)
        if name in names:
            raise InputError(f"{path}: tensors {names[name]} and {spelled} are one and the same")
        if name is not None:
            names[name] = spelled
    model = _model_prefix(path, names)
    for module in ("lm_head", f"{model}embed_tokens"):
        if settings.targets(module):
            raise InputError(
                f"{file}: target_modules has {module}; supported are linear layers in the blocks"
            )

    def spelled_module(module: str) -> str:
        return model + module.removeprefix(_MODEL)

    return _Source(
        names,
        lambda name: stored[names[name]],
        rank=lambda module: settings.rank_of(spelled_module(module)),
        scale=lambda module: settings.scale_of(spelled_module(module)),
        targets=lambda module: settings.targets(spelled_module(module)),
        expectation=f"but {_CONFIG} targets its module",
    )


def _name(spelled: str) -> str | None:
    """The name of a matrix as PEFT saves one of a decoder; None where no decoder needs it.

    Training loops that save by themselves leave the adapter's own name in it, "default". Models
    that also see have a longer name for the decoder.
    """
    if not spelled.startswith(_PREFIX):
        return spelled
    name = canonical(
        re.sub(r"(\.lora_[AB])\.default\.weight$", r"\1.weight", spelled[len(_PREFIX) :])
    )
    return None if name is None else _PREFIX + name


def _model_prefix(path: Path, names: Mapping[str, str]) -> str:
    """What stands before "layers" in the adapted model's own names."""
    prefixes = {
        spelled[len(_PREFIX) : spelled.index("layers.")]
        for name, spelled in names.items()
        if name.startswith(f"{_PREFIX}{_MODEL}layers.")
    }
    if len(prefixes) > 1:
        first, second = sorted(prefixes)[:2]
        raise InputError(f"{path}: tensors are of {first}layers and of {second}layers")
    return prefixes.pop() if prefixes else _MODEL


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


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    file, pickled = path / _WEIGHTS, path / _PICKLED
    if not file.exists() and pickled.exists():
        raise InputError(
            f"{pickled}: a pickle, which is never loaded; PeftModel.from_pretrained reads it and "
            f"save_pretrained then writes {_WEIGHTS}"
        )
    if not file.is_file():
        raise InputError(f"{file}: {'not a regular file' if file.exists() else 'no such file'}")
    arrays = {}
    with (
        reading(file, "not a whole safetensors file"),
        safe_open(file, framework="numpy") as opened,
    ):
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            dtype = opened.get_slice(name).get_dtype()
            if dtype not in _FLOATS:
                raise InputError(
                    f"{file}: tensor {name} is {dtype}, not one of {', '.join(_FLOATS)}"
                )
            arrays[name] = opened.get_tensor(name)
    return arrays


def lora_tensors(config: ModelConfig, rank: int) -> list[Tensor]:
    """A and B of every linear layer inside the blocks, as PEFT names them."""
    return [tensor for weight in _linear_weights(config) for tensor in _pair(weight, rank)]


def _linear_weights(config: ModelConfig) -> list[Tensor]:
    return [t for t in tensors(config) if t.path[0] == "layers" and len(t.source) == 2]


def _pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a weight."""
    out, into = weight.source
    stem = _PREFIX + weight.name.removesuffix(".weight")
    sizes = (*weight.sizes, ("R", rank))
    return (
        Tensor(f"{stem}.lora_A.weight", (*weight.path, "a"), ("R", into), f"{into}R", sizes),
        Tensor(f"{stem}.lora_B.weight", (*weight.path, "b"), (out, "R"), f"R{out}", sizes),
    )
