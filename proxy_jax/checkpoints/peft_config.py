"""PEFT's adapter_config.json: which modules a LoRA adapter changes, at what rank and scale.

A module is named as in the model that was adapted, "model.layers.0.self_attn.q_proj". What PEFT
does with such names is in its tuners/tuners_utils.py (check_target_module_exists) and
utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from proxy_jax.errors import InputError
from proxy_jax.reading import Fields, read_json, reading, shown

Names: TypeAlias = re.Pattern[str] | tuple[str, ...]  # of modules, or the ends of their names
_LARGEST_RANK = 2**20
_LARGEST_ALPHA = float(np.finfo(np.float32).max)

# What is read below.
_READ = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
)
# What does not change how a linear layer's adapter computes, whatever the value.
_NEUTRAL = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",  # PEFT reads none
    "merge_weights",
    "fan_in_fan_out",  # PEFT puts it right for linear layers
    "ensure_weight_tying",  # of embeddings, heads and modules_to_save
    "megatron_core",  # beside megatron_config
    "qalora_group_size",  # beside use_qalora
)
# What must have one of these values, or be null. Any other field must be null: PEFT's releases add
# fields for variants of LoRA, with null for "not this one".
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "loftq_config": ({},),
    # The others change the base model's weights, or may.
    "init_lora_weights": (True, False, "gaussian"),
}


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Says of each module whether, at what rank and at what scale it is adapted.

    Attributes:
      rank, alpha: of modules that no pattern matches.
      rank_patterns, alpha_patterns: those of modules that a pattern matches; the first one counts.
      rank_stabilised: the scale is alpha / sqrt(rank) (Kalajdzievski 2023), not alpha / rank.
      target_modules, exclude_modules: which modules are adapted, and which are not even so.
      layers: indices of the layers that are adapted; None for all.
      layer_patterns: find the index in a module's name.
    """

    rank: int
    alpha: float
    rank_patterns: Sequence[tuple[re.Pattern[str], int]]
    alpha_patterns: Sequence[tuple[re.Pattern[str], float]]
    rank_stabilised: bool
    target_modules: Names
    exclude_modules: Names
    layers: tuple[int, ...] | None
    layer_patterns: Sequence[re.Pattern[str]]

    def rank_of(self, module: str) -> int:
        """Gives the rank of a module's matrices."""
        return next((r for pattern, r in self.rank_patterns if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Gives what a module's A B is multiplied with."""
        rank = self.rank_of(module)
        alpha = next((a for pattern, a in self.alpha_patterns if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def targets(self, module: str) -> bool:
        """Says whether a module is adapted."""
        if _names_module(self.exclude_modules, module):
            return False
        if not _names_module(self.target_modules, module):
            return False
        whole_name = not isinstance(self.target_modules, re.Pattern) and (
            module in self.target_modules
        )
        return self.layers is None or whole_name or self._layer_of(module) in self.layers

    def _layer_of(self, module: str) -> int | None:
        matches = (pattern.match(module) for pattern in self.layer_patterns)
        return next((int(match["idx"]) for match in matches if match), None)


def read_settings(file: Path) -> LoraSettings:
    """Reads adapter_config.json, and refuses what is not scale * A B on linear layers.

    Raises:
      InputError: no adapter_config.json, a value out of range, or a field that is not known to
        leave the adapter so; names the field.
    """
    fields = Fields(str(file), read_json(file))
    fields.string("peft_type")
    for key, value in fields.fields.items():
        if value is None or key in _READ or key in _NEUTRAL:
            continue
        if value not in _PLAIN.get(key, ()):
            raise InputError(f"{file}: {key}={shown(value)} is not supported")
    fields.real("lora_dropout", 0, 1, default=0.0)  # of training only
    layers, layer_patterns = _layers(fields)
    ranks = fields.inner("rank_pattern") or Fields(str(file), {})
    alphas = fields.inner("alpha_pattern") or Fields(str(file), {})
    return LoraSettings(
        rank=_rank(fields, "r"),
        alpha=_alpha(fields, "lora_alpha"),
        rank_patterns=tuple((_ending(ranks, key), _rank(ranks, key)) for key in ranks.fields),
        alpha_patterns=tuple((_ending(alphas, key), _alpha(alphas, key)) for key in alphas.fields),
        rank_stabilised=fields.flag("use_rslora", default=False),
        target_modules=_target_modules(fields),
        exclude_modules=_names(fields, "exclude_modules"),
        layers=layers,
        layer_patterns=layer_patterns,
    )


def _rank(fields: Fields, key: str) -> int:
    return fields.integer(key, 1, _LARGEST_RANK)


def _alpha(fields: Fields, key: str) -> float:
    return fields.real(key, high=_LARGEST_ALPHA, above=0)


def _ending(fields: Fields, pattern: str) -> re.Pattern[str]:
    """The names that a key of rank_pattern or alpha_pattern stands for: those that end so."""
    return _compiled(fields, rf"(.*\.)?({pattern})$", pattern)


def _target_modules(fields: Fields) -> Names:
    targets = fields.fields.get("target_modules")
    if targets is None:
        raise InputError(f"{fields.where}: target_modules is missing")
    if isinstance(targets, str) and targets.lower() == "all-linear":  # those outside stay as well
        return re.compile(r"(.*\.)?layers\.\d+\..*")
    return _names(fields, "target_modules")


def _names(fields: Fields, key: str) -> Names:
    value = fields.fields.get(key)
    if isinstance(value, str) and value:
        return _compiled(fields, value, value)
    return _strings(fields, key)


def _layers(fields: Fields) -> tuple[tuple[int, ...] | None, tuple[re.Pattern[str], ...]]:
    """The layers that are adapted, None for all, and what finds a layer in a module's name."""
    layers, patterns = fields.fields.get("layers_to_transform"), _strings(fields, "layers_pattern")
    if patterns and layers is None:
        raise InputError(f"{fields.where}: layers_pattern without layers_to_transform")
    if layers is not None and isinstance(fields.fields.get("target_modules"), str):
        raise InputError(f"{fields.where}: layers_to_transform needs a list of target_modules")
    if isinstance(layers, list):
        indices = fields.array("layers_to_transform", int) or None
    else:
        index = fields.integer("layers_to_transform", default=None)
        indices = None if index is None else (index,)
    if not patterns:
        return indices, (re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\."),)
    return indices, tuple(
        _compiled(fields, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", pattern) for pattern in patterns
    )


def _strings(fields: Fields, key: str) -> tuple[str, ...]:
    """A list of strings, or one by itself; nothing for an empty one."""
    value = fields.fields.get(key)
    if isinstance(value, str):
        return (value,) if value else ()
    return fields.array(key, str, default=())


def _compiled(fields: Fields, expression: str, written: str) -> re.Pattern[str]:
    with reading(fields.where, f"{shown(written)} is not a regular expression"):
        return re.compile(expression)


def _names_module(names: Names, module: str) -> bool:
    if isinstance(names, re.Pattern):
        return names.fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
