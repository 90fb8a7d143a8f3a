"""Training runs as models: the weights of a run's checkpoints, read a part of an array at a time.

A run of train.sft leaves manifest.json (its "config" started the run), checkpoints/STEP, and, where
all weights are trained, model/ with config.json and the tokenizer. A checkpoint is Orbax's: one
OCDBT store of Zarr arrays, each named by its path in the training state, of which TensorStore reads
the parts that are asked for. Weights are below "trained", layers unrolled or stacked.

Zarr's chunks are compressed without check sums, so that a flipped bit or a page of zeros would read
as weights: a run leaves sums of its arrays in the checkpoint's metadata, and they are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from proxy_jax.checkpoints.names import Tensor, tensors
from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint
from proxy_jax.errors import InputError
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.reading import Fields, read_json, reason

_MANIFEST, _CHECKPOINTS, _MODEL = "manifest.json", "checkpoints", "model"
_STORE, _TRAINED, _METADATA = "state", "trained.", "/zarr.json"
_ORBAX = "_CHECKPOINT_METADATA"
_PIECE = 2**22  # numbers that are summed at a time
_CACHE_ROOM = 2**20  # what a cached array takes besides its numbers; without it nothing stays


@dataclasses.dataclass(frozen=True)
class Run:
    """One checkpoint of a training run.

    Attributes:
      directory: of the run.
      checkpoint: directory of the checkpoint.
      base: path or hub id of the model that was tuned; may be empty if all weights are trained.
      rank: of the LoRA adapter that is trained; 0 if all weights are.
      scale: lora_alpha / rank.
    """

    directory: Path
    checkpoint: Path
    base: str
    rank: int
    scale: float


def find_run(location: str | Path) -> Run | None:
    """The run that a path names: its directory, for the latest checkpoint, or one checkpoint's.

    Returns:
      None if the path is something else: absent, a file, a model's or an adapter's directory.

    Raises:
      InputError: a run that has no such checkpoint, or none yet, or whose manifest cannot be read.
    """
    path = Path(location).expanduser()
    named = path.name.isdigit() and path.parent.name == _CHECKPOINTS
    directory = path.parent.parent if named else path
    if not _is_run(directory):
        return None
    base, rank, alpha = _settings(directory / _MANIFEST)
    # What Orbax has not finished to write has a longer name than the step.
    steps = [p for p in (directory / _CHECKPOINTS).glob("*") if p.name.isdigit()]
    if not steps:
        raise InputError(f"{directory}: a training run that has saved no checkpoint yet")
    checkpoint = path if named else max(steps, key=lambda p: int(p.name))
    if checkpoint not in steps:
        there = ", ".join(sorted((p.name for p in steps), key=int))
        raise InputError(f"{path}: no such checkpoint; the run has {there}")
    return Run(directory, checkpoint, base, rank, alpha / rank if rank else 0.0)


def _is_run(directory: Path) -> bool:
    if any((directory / file).exists() for file in ("config.json", "adapter_config.json")):
        return False
    return (directory / _MANIFEST).is_file() or (directory / _CHECKPOINTS).is_dir()


def _settings(manifest: Path) -> tuple[str, int, float]:
    """Base, LoRA's rank and lora_alpha."""
    config = Fields(str(manifest), read_json(manifest)).inner("config")
    lora = config and config.inner("lora")
    if not config or not lora:
        raise InputError(f"{manifest}: not the manifest of a training run")
    rank, alpha = lora.integer("rank", 0), lora.real("alpha", above=0)
    base = config.string("base", default="")
    if rank and not base:
        raise InputError(f"{manifest}: base must be the path or hub id of a model")
    return os.path.expandvars(base), rank, alpha


class NativeCheckpoint:
    """The model of a run that trains all weights, at one checkpoint.

    Args:
      run: see `find_run`.

    Attributes:
      path: the checkpoint's directory.
      hf_config: the parsed model/config.json.

    Raises:
      InputError: a run that trains an adapter only, or whose model/ has no config.json.
    """

    def __init__(self, run: Run):
        if run.rank:
            raise InputError(
                f"{run.directory}: holds a LoRA adapter on {run.base}, not a whole model"
            )
        self.path = run.checkpoint
        self._model = SafetensorsCheckpoint(run.directory / _MODEL)
        self.hf_config = self._model.hf_config
        config = config_from_hf(self.hf_config, str(self._model.path))
        self._arrays = TrainedArrays(run.checkpoint, tensors(config))

    @property
    def at_hand(self) -> bool:
        """Whether the weights are on disk."""
        return True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors; of arrays that no tensor of the model corresponds to, their own."""
        return self._arrays.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._arrays.shape(name)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor, in its stored dtype."""
        return self._arrays.read(name, index)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, as model/ names them."""
        return self._model.eos_ids

    def tokenizer(self) -> Any:
        """The tokenizer in model/."""
        return self._model.tokenizer()


class TrainedArrays:
    """The trained arrays of a checkpoint, under the names and in the layout of other formats.

    Nothing is read before it is asked for.

    Args:
      checkpoint: directory of a run's checkpoint.
      table: what the arrays correspond to.
    """

    def __init__(self, checkpoint: Path, table: Sequence[Tensor]):
        self._checkpoint = checkpoint
        self._table = {tensor.name: tensor for tensor in table}
        self._layers = len({tensor.path[1] for tensor in table if tensor.path[0] == "layers"})
        self._whole: set[str] = set()  # arrays that were compared
        self._current: tuple[str, Any] = ("", None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that are there; of arrays that belong to none, their own."""
        there = {name: self._place(tensor)[0] for name, tensor in self._table.items()}
        found = [name for name, array in there.items() if array in self._stored]
        return (*found, *sorted(set(self._stored) - set(there.values())))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, in the layout of the other format.

        Raises:
          InputError: the array that holds it has another shape than the tensor asks for.
        """
        tensor = self._table[name]
        array, layer = self._place(tensor)
        sizes = dict(tensor.sizes)
        lead = () if layer is None else (self._layers,)
        expected = lead + tuple(sizes[letter] for letter in tensor.target)
        if self._stored[array].shape != expected:
            raise InputError(
                f"{self._checkpoint}: array {array} has shape {self._stored[array].shape}, "
                f"the model asks for {expected}"
            )
        return tensor.source_shape

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor or a part of it, heads whole, in the layout of the other format.

        Raises:
          InputError: the array is damaged, or gone since.
        """
        tensor = self._table[name]
        array, layer = self._place(tensor)
        chosen: tuple[Any, ...] = () if layer is None else (layer,)
        chosen += _index_of_ours(tensor, index or (slice(None),) * len(tensor.source))
        values = self._try(array, lambda: self._cached(array)[chosen].read().result())
        # As if the whole tensor were this part.
        part = tuple(zip(tensor.target, values.shape, strict=True))
        return dataclasses.replace(tensor, sizes=part).to_file(values)

    def _place(self, tensor: Tensor) -> tuple[str, int | None]:
        """The array that holds a tensor, and its layer's place in it if layers are stacked."""
        key, *rest = map(str, tensor.path)
        stacked = ".".join([key, *rest[1:]])
        if key == "layers" and stacked in self._stored:
            return stacked, int(tensor.path[1])
        return ".".join([key, *rest]), None

    @functools.cached_property
    def _stored(self) -> dict[str, ts.TensorStore]:
        below = ts.KvStore.KeyRange(_TRAINED, _TRAINED[:-1] + "/")  # "/" comes after "."
        store = ts.KvStore.open(self._spec)
        keys = self._try(
            "its arrays", lambda: [k.decode() for k in store.result().list(below).result()]
        )
        names = [
            key.removeprefix(_TRAINED).removesuffix(_METADATA)
            for key in keys
            if key.endswith(_METADATA)
        ]
        if not names:
            raise InputError(f"{self._checkpoint}: not a whole checkpoint, it holds no weights")
        opening = {name: self._open(name) for name in names}
        return {name: self._try(name, opening[name].result) for name in names}

    @property
    def _spec(self) -> dict[str, Any]:
        path = f"{(self._checkpoint / _STORE).absolute()}/"
        return {"driver": "ocdbt", "base": {"driver": "file", "path": path}}

    @functools.cached_property
    def _sums(self) -> Fields | None:
        """Check sums of the state's arrays by name, as train.checkpoint leaves them."""
        path = self._checkpoint / _ORBAX
        if not path.exists():
            return None
        custom = Fields(str(path), read_json(path)).inner("custom_metadata")
        return custom and custom.inner("sums")

    def _check(self, array: str, stored: ts.TensorStore) -> None:
        """Compares an array with its check sum; what is read for it stays in the cache."""
        if self._sums is None or array in self._whole:
            return
        total, step = 0, max(1, _PIECE // math.prod(stored.shape[1:]))
        for start in range(0, stored.shape[0], step):
            stop = min(start + step, stored.shape[0])
            bits = np.ascontiguousarray(stored[start:stop].read().result())
            total += int(bits.view(np.uint32).sum(dtype=np.uint64))
        if total % 2**32 != self._sums.integer(f"{_TRAINED}{array}".replace(".", "/")):
            raise InputError(
                f"{self._checkpoint}: array {array} is damaged, it is not what was saved"
            )
        self._whole.add(array)

    def _open(self, array: str, cache: int = 0) -> Any:
        spec = {
            "driver": "zarr3",
            "kvstore": {**self._spec, "path": f"{_TRAINED}{array}/"},
            "fill_missing_data_reads": False,  # an error, not zeros
            # What is cached does not change.
            "recheck_cached_metadata": "open",
            "recheck_cached_data": "open",
        }
        context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
        return ts.open(spec, context=context, open=True, read=True)

    def _cached(self, array: str) -> ts.TensorStore:
        """An array whose parts stay in memory until one of another array is read.

        A stored piece may hold several layers, or what several devices ask for.
        """
        if self._current[0] != array:
            stored = self._stored[array]
            size = math.prod(stored.shape) * stored.dtype.numpy_dtype.itemsize
            self._current = ("", None)  # let go of the one before
            opened = self._open(array, cache=size + _CACHE_ROOM).result()
            self._check(array, opened)
            self._current = (array, opened)
        return self._current[1]

    def _try(self, what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except InputError:
            raise
        except Exception as error:  # TensorStore raises many kinds
            why = reason(error).split(" [")[0]  # it appends where in its code
            raise InputError(f"{self._checkpoint}: cannot read {what} ({why})") from error


def _index_of_ours(tensor: Tensor, index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The inverse of `Tensor.source_index`."""
    sizes = dict(tensor.sizes)
    cut: dict[str, slice] = {}
    for group, part, whole in zip(tensor.source, index, tensor.source_shape, strict=True):
        inner = math.prod(sizes[letter] for letter in group[1:])
        start, stop, _ = part.indices(whole)
        cut |= {letter: slice(0, sizes[letter]) for letter in group[1:]}
        cut[group[0]] = slice(start // inner, stop // inner)
    return tuple(cut[letter] for letter in tensor.target)
