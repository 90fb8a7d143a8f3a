"""Opens checkpoints of any format and loads their weights onto the mesh."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from proxy_jax.checkpoints.names import Tensor, tensors
from proxy_jax.checkpoints.native import NativeCheckpoint, find_run
from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint
from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params, abstract_params, logical_axes
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.quantized import (
    Quantized,
    map_weights,
    quantise,
    quantized_axes,
    quantized_shapes,
    turned_axes,
)
from proxy_jax.models.turned import INPUTS, Turned, turn
from proxy_jax.reading import reading
from proxy_jax.sharding import Axes, Placement, is_axes

Progress = Callable[[int], object]
Keys: TypeAlias = tuple[str | int, ...]
Shape: TypeAlias = tuple[int, ...]
Index: TypeAlias = tuple[slice, ...]
_HUB_CONFIG = ("*.json", "*.model", "*.txt", "*.jinja")
_HUB_WEIGHTS = ("*.safetensors",)
_ALIGNED = 64  # bytes: what XLA's CPU devices ask of memory that they take over
_PIECE = 2**22  # numbers that are read at a time
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Checkpoint(Protocol):
    """A model on disk, its tensors under Hugging Face names and in their layout."""

    path: Path
    hf_config: dict[str, Any]

    @property
    def at_hand(self) -> bool:
        """Whether the weights are on disk, or have to be downloaded first."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, as floating-point numbers."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, as far as the files name them."""

    def tokenizer(self) -> Any:
        """A transformers tokenizer."""


Fill: TypeAlias = Callable[[np.ndarray, Checkpoint, Tensor, Index], None]


def open_checkpoint(location: str) -> Checkpoint:
    """Opens a Hugging Face directory, a GGUF file, a training run, or a model of the hub.

    A run is one of train.sft that trains all weights: its directory, which stands for its latest
    checkpoint, or the directory of one checkpoint.

    Only the config is read, not the weights: those of a hub model are downloaded when they are
    first asked for.

    Raises:
      InputError: nothing there, or nothing that can be read, or a run that trains an adapter only.
    """
    with reading(location):
        path = Path(location).expanduser()
    if path.is_file():
        from proxy_jax.checkpoints.gguf import GGUFCheckpoint  # needs gguf, which nothing else does

        return GGUFCheckpoint(path)
    if run := find_run(path):
        return NativeCheckpoint(run)
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf" or location.startswith(("/", ".", "~")) or location.count("/") != 1:
        raise InputError(f"{location}: no such file or directory, and not a hub id (owner/name)")
    config = _download(location, _HUB_CONFIG)
    return SafetensorsCheckpoint(config, fetch=lambda: _download(location, _HUB_WEIGHTS))


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Reads a checkpoint's architecture: from its config, and the head from weights on disk.

    A config may tie the head to the embedding, by its family's default too, where the file holds
    another one. That head is the model's, as it is in transformers.

    Raises:
      InputError: a config that cannot be read, or weights that cannot.
    """
    config = config_from_hf(checkpoint.hf_config, str(checkpoint.path))
    if config.tied_head and checkpoint.at_hand and _has_own_head(checkpoint):
        return dataclasses.replace(config, tied_head=False)
    return config


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether a file holds a head that is not the embedding once more."""
    names = checkpoint.names
    if _HEAD not in names or _EMBEDDING not in names:
        return _HEAD in names
    shape = checkpoint.shape(_HEAD)
    if shape != checkpoint.shape(_EMBEDDING):
        return True
    step = max(1, _PIECE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        part = (rows, *[slice(None)] * (len(shape) - 1))
        head, embedding = (checkpoint.read(name, part) for name in (_HEAD, _EMBEDDING))
        if not np.array_equal(head, embedding):
            return True
    return False


def _download(hub_id: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=[*files], ignore_patterns="consolidated*")
        )
    except Exception as error:  # network, authorisation and naming errors of several libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{hub_id}: no such directory, and the hub does not give it ({reason})"
        ) from error


def load_params(
    checkpoints: Sequence[Checkpoint],
    config: ModelConfig,
    dtype: Any,
    place: Placement,
    *,
    stacked: bool,
    quantize: str = "",
    turned: bool = False,
    progress: Progress = lambda parameters: None,
) -> Params:
    """Loads a model's weights, each device's part read on its own.

    Beside the weights themselves a process holds one array's parts on its devices, all layers of a
    stacked one, and a piece of a tensor. A CPU's devices take those parts over: there it is the
    piece alone.

    Args:
      checkpoints: of the model; two or more models of one architecture are loaded side by side,
        with a leading axis for the model.
      config: their architecture.
      dtype: of the parameters, whatever the files hold.
      place: the mesh and rules.
      stacked: one array with a leading axis for all layers, instead of a tuple of layers.
      quantize: "int8" stores the large weights so (proxy_jax.models.quantized), each one quantised
        as it is read.
      turned: the large weights have their outputs first (proxy_jax.models.turned); quantised ones
        always have.
      progress: called with the number of parameters after each array.

    Raises:
      InputError: a tensor that is missing, unknown, or of another shape than the config says.
    """
    lead = (len(checkpoints),) if len(checkpoints) > 1 else ()
    table = {tensor.path: tensor for tensor in tensors(config)}
    for checkpoint in checkpoints:
        check_tensors(checkpoint, list(table.values()), tied=config.tied_head)
    dtype = jnp.dtype(dtype)

    def array(keys: Keys, names: Axes, shape: Shape, dtype: np.dtype, fill: Fill) -> jax.Array:
        layers = config.num_layers if stacked and keys[0] == "layers" else 0
        members = (
            [table[("layers", i, *keys[1:])] for i in range(layers)] if layers else [table[keys]]
        )
        whole = lead + ((layers,) if layers else ()) + shape
        sharding = place.sharding((None,) * (len(whole) - len(shape)) + names)

        def part(index: Any) -> np.ndarray:
            rest = index[len(index) - len(shape) :]
            chosen = checkpoints[index[0]] if lead else checkpoints
            of_each = members[index[len(lead)]] if layers else members
            sizes = [len(range(*cut.indices(n))) for cut, n in zip(index, whole, strict=True)]
            filled = _empty(sizes, dtype)
            targets = filled.reshape(-1, *sizes[len(sizes) - len(shape) :])
            blocks = itertools.product(chosen, of_each)
            for target, (checkpoint, tensor) in zip(targets, blocks, strict=True):
                fill(target, checkpoint, tensor, rest)
            return filled

        return jax.make_array_from_callback(whole, sharding, part)

    def load(keys: Keys, names: Axes) -> jax.Array | Quantized | Turned:
        tensor = table[("layers", 0, *keys[1:]) if stacked and keys[0] == "layers" else keys]
        shape = tuple(dict(tensor.sizes)[letter] for letter in tensor.target)
        if quantize and keys[-1] in INPUTS:
            quantized = load_quantized(keys, names, shape, INPUTS[keys[-1]])
            progress(quantized.values.size)
            return quantized
        if turned and keys[-1] in INPUTS:
            values = load_turned(keys, names, shape, INPUTS[keys[-1]])
            progress(values.size)
            return Turned(values)
        loaded = array(keys, names, shape, dtype, _read_into)
        progress(loaded.size)
        return loaded

    def load_turned(keys: Keys, names: Axes, shape: Shape, inputs: int) -> jax.Array:
        into, out = shape[:inputs], shape[inputs:]

        def values(
            target: np.ndarray, checkpoint: Checkpoint, tensor: Tensor, index: Index
        ) -> None:
            ours = index[len(out) :] + index[: len(out)]
            _read_into(
                np.moveaxis(target, range(-inputs, 0), range(inputs)), checkpoint, tensor, ours
            )

        return array(keys, names[inputs:] + names[:inputs], out + into, dtype, values)

    def load_quantized(keys: Keys, names: Axes, shape: Shape, inputs: int) -> Quantized:
        into, out = shape[:inputs], shape[inputs:]
        made: dict[Any, np.ndarray] = {}  # scales, by what they are of

        def name(checkpoint: Checkpoint, tensor: Tensor, outputs: Index) -> Any:
            cuts = (cut.indices(size) for cut, size in zip(outputs, out, strict=True))
            return id(checkpoint), tensor.name, *cuts

        def values(
            target: np.ndarray, checkpoint: Checkpoint, tensor: Tensor, index: Index
        ) -> None:
            outputs, here = index[: len(out)], index[len(out) :]
            scales = np.empty(target.shape[: len(out)], np.float32)
            # An output's scale is that of all its inputs, whichever of them lie here.
            all_inputs = (slice(None),) * inputs
            for there, piece in _pieces(checkpoint, tensor, all_inputs + outputs):
                turned = np.moveaxis(piece, range(inputs), range(-inputs, 0))
                rounded, scales[there[inputs:]] = quantise(turned, len(out))
                target[there[inputs:]] = rounded[(slice(None),) * len(out) + here]
            made[name(checkpoint, tensor, outputs)] = scales

        def scales(
            target: np.ndarray, checkpoint: Checkpoint, tensor: Tensor, index: Index
        ) -> None:
            target[...] = made[name(checkpoint, tensor, index)]

        int8, float32 = np.dtype(np.int8), np.dtype(np.float32)
        return Quantized(
            array(keys, names[inputs:] + names[:inputs], out + into, int8, values),
            array(keys, names[inputs:], out, float32, scales),
        )

    axes = logical_axes(config)
    if stacked:
        axes = {**axes, "layers": axes["layers"][0]}
    return _map_axes(load, axes)


def param_shapes(
    config: ModelConfig,
    dtype: Any,
    place: Placement,
    *,
    stacked: bool,
    copies: int = 1,
    quantize: str = "",
    turned: bool = False,
) -> Params:
    """What `load_params` gives for so many checkpoints, as jax.ShapeDtypeStructs with shardings."""
    lead = (copies,) if copies > 1 else ()
    axes = logical_axes(config)
    whole = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), abstract_params(config)
    )
    if quantize:
        whole, axes = quantized_shapes(whole), quantized_axes(axes)
    elif turned:
        whole = jax.eval_shape(lambda params: map_weights(turn, params), whole)
        axes = turned_axes(axes)

    def shape(names: Axes, leaf: Any, lead: Shape) -> Any:
        sharding = place.sharding((None,) * len(lead) + names)
        return jax.ShapeDtypeStruct(lead + leaf.shape, leaf.dtype, sharding=sharding)

    def shapes(axes: Any, leaves: Any, lead: Shape) -> Any:
        return jax.tree.map(lambda a, x: shape(a, x, lead), axes, leaves, is_leaf=is_axes)

    rest = {name: shapes(axes[name], whole[name], lead) for name in whole if name != "layers"}
    if stacked:
        one = shapes(axes["layers"][0], whole["layers"][0], (*lead, config.num_layers))
        return {**rest, "layers": one}
    return {**rest, "layers": shapes(axes["layers"], whole["layers"], lead)}


def check_tensors(checkpoint: Checkpoint, table: list[Tensor], *, tied: bool) -> None:
    """Compares names and shapes of a checkpoint with what the config asks for.

    Raises:
      InputError: names the tensor.
    """
    expected = {tensor.name: tensor for tensor in table}
    stored = set(checkpoint.names)
    if tied and _HEAD in stored:  # some files store the tied head once more
        if _has_own_head(checkpoint):
            raise InputError(
                f"{checkpoint.path}: tensor {_HEAD} is another than the embedding, though the "
                "config ties them; name this directory as the model, instead of its hub id"
            )
        stored.discard(_HEAD)
    if missing := sorted(set(expected) - stored):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{checkpoint.path}: tensor {missing[0]}{more} is missing")
    if unknown := sorted(stored - set(expected)):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"{checkpoint.path}: tensor {unknown[0]}{more} is not part of a model with this config"
        )
    for name, tensor in expected.items():
        if checkpoint.shape(name) != tensor.source_shape:
            raise InputError(
                f"{checkpoint.path}: tensor {name} has shape {checkpoint.shape(name)}, "
                f"the config asks for {tensor.source_shape}"
            )


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that a CPU device takes as it is, instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNED, np.uint8)
    start = -room.ctypes.data % _ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)


def _read_into(target: np.ndarray, checkpoint: Checkpoint, tensor: Tensor, index: Index) -> None:
    """Fills an array with a part of a tensor."""
    for there, piece in _pieces(checkpoint, tensor, index):
        target[there] = piece


def _pieces(
    checkpoint: Checkpoint, tensor: Tensor, index: Index
) -> Iterator[tuple[Index, np.ndarray]]:
    """A part of a tensor in our layout, a few of the file's rows at a time, and where they go.

    A file's numbers may take twice as much memory as ours, and those of a quantised one four times.
    """
    letter = tensor.source[0][0]
    axis = tensor.target.index(letter)
    whole = dict(tensor.sizes)[letter]
    first, last, _ = index[axis].indices(whole)
    step = max(1, _PIECE // (math.prod(tensor.source_shape) // whole))
    for start in range(first, last, step):
        rows = slice(start, min(start + step, last))
        piece = checkpoint.read(
            tensor.name, tensor.source_index((*index[:axis], rows, *index[axis + 1 :]))
        )
        there = (slice(None),) * axis + (slice(rows.start - first, rows.stop - first),)
        yield there, tensor.to_ours(piece)


def _map_axes(load: Any, axes: Any, path: tuple[str | int, ...] = ()) -> Any:
    """Maps load(path, axes) over a tree of logical axes."""
    if isinstance(axes, dict):
        return {key: _map_axes(load, value, (*path, key)) for key, value in axes.items()}
    if path == ("layers",):  # a tuple of layers, not of names
        return tuple(_map_axes(load, value, (*path, i)) for i, value in enumerate(axes))
    return load(path, axes)
