"""What can be told of a training config before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from proxy_jax.errors import InputError
from proxy_jax.models.decoder import REMAT
from proxy_jax.models.lora import MODULES
from proxy_jax.reading import Fields, shown
from proxy_jax.sharding import MESH_AXES, ShardingRules
from train.examples import FORMATS
from train.optimizer import LARGEST, LARGEST_BELOW_1, SMALLEST, OptimizerConfig

# Those that passes are computed and experts written in.
DTYPES = ("float32", "bfloat16", "float16")
_MOST = 2**31 - 1  # steps and rows: they are counted in int32
_LONGEST = 2**24  # tokens
_HIGHEST_RANK = 2**16


def check_config(config: ConfigDict) -> None:
    """Refuses what a run cannot be made of.

    Raises:
      InputError: names what is missing, unknown, or does not fit.
    """
    fields = _fields(config)
    if not fields.string("output_dir"):
        raise InputError("output_dir is empty")
    if not _part(fields, "data").string("path"):
        raise InputError("data.path is empty: which rows are trained on?")
    check_values(config)


def check_values(config: ConfigDict) -> None:
    """Refuses what can be told from the values alone, whatever is to be done with them.

    Raises:
      InputError: names the field and what was expected.
    """
    fields = _fields(config)
    for name in ("base", "tokenizer", "topology", "output_dir"):
        fields.string(name)
    for name in ("packing", "distributed"):
        fields.flag(name)
    _integer(fields, "held_out", 0, _MOST)
    _integer(fields, "max_length", 2, _LONGEST)
    _integer(fields, "seed", 0, 2**32 - 1)
    _integer(fields, "eval_every", 0, _MOST)
    for name in ("epochs", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep"):
        _integer(fields, name, 1, _MOST)
    if config.batch_size % config.accumulate:
        raise InputError(
            f"batch_size {config.batch_size} does not divide into {config.accumulate} micro-batches"
        )
    for name in ("compute_dtype", "export_dtype"):
        fields.choice(name, DTYPES)
    if fields.string("remat") not in REMAT:
        raise InputError(f"remat {config.remat!r} is unknown; known: {', '.join(REMAT)}")
    if fields.string("layers") not in ("auto", "scanned", "unrolled"):
        raise InputError(f"layers {config.layers!r} is unknown; use auto, scanned or unrolled")
    _check_data(_part(fields, "data"))
    _check_lora(_part(fields, "lora"))
    optimizer_config(config)
    consistent = _part(fields, "consistent")
    consistent.string("base")
    consistent.real("alpha_train", -LARGEST, LARGEST)
    if bool(config.consistent.alpha_train) != bool(config.consistent.base):
        raise InputError("consistent.alpha_train and consistent.base go together: set both or none")
    _part(fields, "architecture")
    if config.consistent.base and not config.base:
        raise InputError("consistent.base is set: base must name the small model, M-")
    _check_mesh(_part(fields, "mesh"))
    axes = [field.name for field in dataclasses.fields(ShardingRules)]
    if unknown := set(fields.array("replicate", str)) - set(axes):
        raise InputError(f"replicate: {min(unknown)!r} is not one of {', '.join(axes)}")


def check_benchmark(config: ConfigDict) -> None:
    """Refuses what a benchmark cannot measure.

    Raises:
      InputError: names the field and what was expected.
    """
    benchmark = _part(_fields(config), "benchmark")
    _integer(benchmark, "steps", 1, _MOST)
    if benchmark.string("compare") not in ("", "torch"):
        raise InputError(f"benchmark.compare {config.benchmark.compare!r} is unknown; use torch")
    if unknown := set(benchmark.array("remat", str)) - set(REMAT):
        raise InputError(f"benchmark.remat {min(unknown)!r} is unknown; known: {', '.join(REMAT)}")
    for rank in benchmark.array("ranks", int):
        if not 0 <= rank <= _HIGHEST_RANK:
            raise InputError(
                f"benchmark.ranks must be between 0 and {_HIGHEST_RANK}, not {shown(rank)}"
            )


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """Gives AdamW as the config says.

    Raises:
      InputError: a field that is missing, unknown, or out of range.
    """
    optimizer = _part(_fields(config), "optimizer")
    known = [field.name for field in dataclasses.fields(OptimizerConfig)]
    if unknown := set(optimizer.fields) - set(known):
        raise InputError(f"optimizer: {min(unknown)!r} is not one of {', '.join(known)}")
    for name in known:
        if optimizer.fields.get(name) is None:
            raise InputError(f"{optimizer.where}: {name} is missing")
    return OptimizerConfig(**optimizer.fields)


def _fields(config: ConfigDict) -> Fields:
    values = config.to_dict()
    _check_plain("config", values)
    return Fields("config", values)


def _check_plain(where: str, value: Any) -> None:
    """Refuses what a manifest, which is JSON, cannot hold."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_plain(f"{where}.{name}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain(where, inner)
    elif isinstance(value, str):
        if "\0" in value or not _is_unicode(value):
            raise InputError(f"{where}: not text, it holds a NUL or half a character: {value!a}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{where} must be finite, not {value}")
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            raise InputError(f"{where} is out of range: {shown(value)}")
    elif value is not None:
        raise InputError(f"{where} must be a number, text, or a list of those, not {shown(value)}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _part(fields: Fields, name: str) -> Fields:
    part = fields.inner(name)
    if part is None:
        raise InputError(f"{fields.where}: {name} is missing")
    return part


def _integer(fields: Fields, name: str, low: int, high: int) -> None:
    fields.integer(name, low, high)
    if isinstance(value := fields.fields[name], float):  # would be used as it is
        raise InputError(f"{fields.where}: {name} must be an integer, not {value}")


def _check_data(data: Fields) -> None:
    for name in ("path", "subset", "split", "chat_template"):
        data.string(name)
    data.choice("format", FORMATS)
    data.flag("skip_invalid")
    _integer(data, "limit", 0, _MOST)


def _check_lora(lora: Fields) -> None:
    _integer(lora, "rank", 0, _HIGHEST_RANK)
    lora.real("alpha", SMALLEST, LARGEST)
    lora.real("dropout", 0, LARGEST_BELOW_1)
    modules = lora.array("modules", str)
    if unknown := set(modules) - set(MODULES):
        raise InputError(f"lora.modules: {min(unknown)!r} is not one of {', '.join(MODULES)}")
    if lora.fields["rank"] and not modules:
        raise InputError("lora.modules is empty: what does the adapter adapt?")


def _check_mesh(mesh: Fields) -> None:
    if unknown := set(mesh.fields) - set(MESH_AXES):
        raise InputError(f"mesh axis {min(unknown)!r} is unknown; axes are {MESH_AXES}")
    for axis in mesh.fields:
        _integer(mesh, axis, -1, _MOST)
        if mesh.fields[axis] == 0:
            raise InputError(f"{mesh.where}: {axis} must be at least 1, or -1, not 0")
    if list(mesh.fields.values()).count(-1) > 1:
        raise InputError(f"{mesh.where}: one axis may be -1, not several")
