"""How Hugging Face tensors and our parameters correspond, in both directions.

Letters: V vocabulary, D model width, F mlp width, N query heads, K kv heads, H head size. A layout
"NH D > D N H" says: the file holds a matrix of N*H rows and D columns; ours is [D, N, H].
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import abstract_params

# (Hugging Face name, path in the params, layout). {i} is the layer. A row applies to the models
# whose params have the path.
_TABLE = (
    ("model.embed_tokens.weight", "embedding", "V D > V D"),
    ("lm_head.weight", "head", "V D > D V"),
    ("model.norm.weight", "final_norm", "D > D"),
    ("model.layers.{i}.self_attn.q_proj.weight", "attention.q", "NH D > D N H"),
    ("model.layers.{i}.self_attn.k_proj.weight", "attention.k", "KH D > D K H"),
    ("model.layers.{i}.self_attn.v_proj.weight", "attention.v", "KH D > D K H"),
    ("model.layers.{i}.self_attn.o_proj.weight", "attention.o", "D NH > N H D"),
    ("model.layers.{i}.self_attn.q_proj.bias", "attention.q_bias", "NH > N H"),
    ("model.layers.{i}.self_attn.k_proj.bias", "attention.k_bias", "KH > K H"),
    ("model.layers.{i}.self_attn.v_proj.bias", "attention.v_bias", "KH > K H"),
    ("model.layers.{i}.self_attn.o_proj.bias", "attention.o_bias", "D > D"),
    ("model.layers.{i}.mlp.gate_proj.weight", "mlp.gate", "F D > D F"),
    ("model.layers.{i}.mlp.up_proj.weight", "mlp.up", "F D > D F"),
    ("model.layers.{i}.mlp.down_proj.weight", "mlp.down", "D F > F D"),
    ("model.layers.{i}.mlp.gate_proj.bias", "mlp.gate_bias", "F > F"),
    ("model.layers.{i}.mlp.up_proj.bias", "mlp.up_bias", "F > F"),
    ("model.layers.{i}.mlp.down_proj.bias", "mlp.down_bias", "D > D"),
)
_QK_NORMS = {
    "none": (),
    "head": (
        ("model.layers.{i}.self_attn.q_norm.weight", "attention.q_norm", "H > H"),
        ("model.layers.{i}.self_attn.k_norm.weight", "attention.k_norm", "H > H"),
    ),
    "projection": (
        ("model.layers.{i}.self_attn.q_norm.weight", "attention.q_norm", "NH > N H"),
        ("model.layers.{i}.self_attn.k_norm.weight", "attention.k_norm", "KH > K H"),
    ),
}
# One Hugging Face name means two things: post_attention_layernorm stands before the MLP in most
# families, and after the attention in those that normalise outputs.
_BLOCK_NORMS = {
    "pre": (
        ("model.layers.{i}.input_layernorm.weight", "attention_norm", "D > D"),
        ("model.layers.{i}.post_attention_layernorm.weight", "mlp_norm", "D > D"),
    ),
    "post": (
        ("model.layers.{i}.post_attention_layernorm.weight", "attention_post_norm", "D > D"),
        ("model.layers.{i}.post_feedforward_layernorm.weight", "mlp_post_norm", "D > D"),
    ),
    "sandwich": (
        ("model.layers.{i}.input_layernorm.weight", "attention_norm", "D > D"),
        ("model.layers.{i}.post_attention_layernorm.weight", "attention_post_norm", "D > D"),
        ("model.layers.{i}.pre_feedforward_layernorm.weight", "mlp_norm", "D > D"),
        ("model.layers.{i}.post_feedforward_layernorm.weight", "mlp_post_norm", "D > D"),
    ),
}
# Spellings of vision-language checkpoints, whose language model has a prefix of its own.
_PREFIXES = (
    (re.compile(r"^language_model\.(model|lm_head)\."), r"\1."),
    (re.compile(r"^model\.language_model\."), "model."),
)
# Tensors that carry nothing the decoder needs: precomputed frequencies, other modalities.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)(vision_tower|multi_modal_projector)\.")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and where it goes.

    Attributes:
      name: in the checkpoint.
      path: keys into the params; layers are integers.
      source: letters of each axis in the file, several where axes are merged ("NH").
      target: letter of each axis of our array.
      sizes: size of each letter.
    """

    name: str
    path: tuple[str | int, ...]
    source: tuple[str, ...]
    target: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        sizes = dict(self.sizes)
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.source)

    def source_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The part of the file's tensor that holds a part of ours.

        Only the leading letter of a merged axis can be cut: heads are kept whole.
        """
        sizes, cut = dict(self.sizes), dict(zip(self.target, index, strict=True))
        found = []
        for group in self.source:
            inner = math.prod(sizes[letter] for letter in group[1:])
            start, stop, _ = cut[group[0]].indices(sizes[group[0]])
            found.append(slice(start * inner, stop * inner))
        return tuple(found)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Splits and permutes (a part of) the file's tensor into ours."""
        sizes, letters = dict(self.sizes), "".join(self.source)
        shape: list[int] = []
        for group, size in zip(self.source, array.shape, strict=True):
            inner = [sizes[letter] for letter in group[1:]]
            shape += [size // math.prod(inner), *inner]
        return array.reshape(shape).transpose([letters.index(letter) for letter in self.target])

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`, of the whole tensor."""
        letters = "".join(self.source)
        array = array.transpose([self.target.index(letter) for letter in letters])
        return np.ascontiguousarray(array).reshape(self.source_shape)


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a model, once."""
    sizes = tuple(config.sizes.items())
    params = abstract_params(config.of_one_layer())  # all layers have the same parameters
    rows = (*_TABLE, *_QK_NORMS[config.qk_norm], *_BLOCK_NORMS[config.norms])
    found = []
    for name, dotted, layout in rows:
        source, target = (side.split() for side in layout.split(">"))
        path = tuple(dotted.split("."))
        layered = "{i}" in name
        if not _has(params["layers"][0] if layered else params, path):
            continue
        for i in range(config.num_layers) if layered else [0]:
            full: tuple[str | int, ...] = ("layers", i, *path) if layered else path
            found.append(Tensor(name.format(i=i), full, tuple(source), "".join(target), sizes))
    return found


def canonical(name: str) -> str | None:
    """The name as the table spells it; None for a tensor that no decoder needs."""
    if _IGNORED.search(name):
        return None
    for pattern, replacement in _PREFIXES:
        name = pattern.sub(replacement, name)
    return name


def _has(tree: dict, path: tuple[str, ...]) -> bool:
    for key in path:
        if key not in tree:
            return False
        tree = tree[key]
    return True
