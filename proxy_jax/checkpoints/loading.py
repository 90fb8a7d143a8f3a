"""Opens checkpoints of any format and loads their weights onto the mesh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from proxy_jax.checkpoints.gguf import GGUFCheckpoint
from proxy_jax.checkpoints.names import Tensor, tensors
from proxy_jax.checkpoints.native import NativeCheckpoint, find_run
from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint
from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params, logical_axes
from proxy_jax.sharding import Placement

Progress = Callable[[int], object]
_HUB_CONFIG = ("*.json", "*.model", "*.txt", "*.jinja")
_HUB_WEIGHTS = ("*.safetensors",)
_ALIGNED = 64  # bytes: what XLA's CPU devices ask of memory that they take over
_PIECE = 2**22  # numbers that are read at a time


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


def open_checkpoint(location: str) -> Checkpoint:
    """Opens a Hugging Face directory, a GGUF file, a training run, or a model of the hub.

    A run is one of train.sft that trains all weights: its directory, which stands for its latest
    checkpoint, or the directory of one checkpoint.

    Only the config is read, not the weights: those of a hub model are downloaded when they are
    first asked for.

    Raises:
      InputError: nothing there, or nothing that can be read, or a run that trains an adapter only.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return GGUFCheckpoint(path)
    if run := find_run(path):
        return NativeCheckpoint(run)
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf" or location.startswith(("/", ".", "~")) or location.count("/") != 1:
        raise InputError(f"{location}: no such file or directory, and not a hub id (owner/name)")
    config = _download(location, _HUB_CONFIG)
    return SafetensorsCheckpoint(config, fetch=lambda: _download(location, _HUB_WEIGHTS))


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
      progress: called with the number of parameters after each array.

    Raises:
      InputError: a tensor that is missing, unknown, or of another shape than the config says.
    """
    lead = (len(checkpoints),) if len(checkpoints) > 1 else ()
    table = {tensor.path: tensor for tensor in tensors(config)}
    for checkpoint in checkpoints:
        check_tensors(checkpoint, list(table.values()), tied=config.tied_head)
    dtype = jnp.dtype(dtype)

    def load(path: tuple[str | int, ...], names: tuple[str | None, ...]) -> jax.Array:
        layers = config.num_layers if stacked and path[0] == "layers" else 0
        members = (
            [table[("layers", i, *path[1:])] for i in range(layers)] if layers else [table[path]]
        )
        shape = tuple(dict(members[0].sizes)[letter] for letter in members[0].target)
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
                _read_into(target, checkpoint, tensor, rest)
            return filled

        array = jax.make_array_from_callback(whole, sharding, part)
        progress(array.size)
        return array

    axes = logical_axes(config)
    if stacked:
        axes = {**axes, "layers": axes["layers"][0]}
    return _map_axes(load, axes)


def check_tensors(checkpoint: Checkpoint, table: list[Tensor], *, tied: bool) -> None:
    """Compares names and shapes of a checkpoint with what the config asks for.

    Raises:
      InputError: names the tensor.
    """
    expected = {tensor.name: tensor for tensor in table}
    stored = set(checkpoint.names)
    if tied:
        stored.discard("lm_head.weight")  # some files store the tied head once more
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


def _read_into(
    target: np.ndarray, checkpoint: Checkpoint, tensor: Tensor, index: tuple[slice, ...]
) -> None:
    """Fills an array with a part of a tensor, a piece at a time.

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
        target[there] = tensor.to_ours(piece)


def _map_axes(load: Any, axes: Any, path: tuple[str | int, ...] = ()) -> Any:
    """Maps load(path, axes) over a tree of logical axes."""
    if isinstance(axes, dict):
        return {key: _map_axes(load, value, (*path, key)) for key, value in axes.items()}
    if path == ("layers",):  # a tuple of layers, not of names
        return tuple(_map_axes(load, value, (*path, i)) for i, value in enumerate(axes))
    return load(path, axes)
