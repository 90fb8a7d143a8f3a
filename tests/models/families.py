"""Tiny random transformers models, at least one of each family, and what torch computes with them.

No size, scale or period is a default or equals another, windows are shorter than the texts and
soft caps lower than the scores: a setting that we drop or take for another changes the logits.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from proxy_jax.checkpoints.loading import load_params
from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.sharding import Placement, make_mesh

ROWS, LENGTH = 3, 22

_SIZES: dict[str, Any] = {
    "vocab_size": 106,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 0.013,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 450.0}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 350.0, "factor": 2.5}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 550.0,
    "factor": 3.0,
    "low_freq_factor": 1.2,
    "high_freq_factor": 4.5,
    "original_max_position_embeddings": 60,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 650.0,
    "factor": 3.5,
    "original_max_position_embeddings": 64,
    "beta_fast": 2.5,
    "beta_slow": 0.3,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"

# name -> (model_type, fields over _SIZES).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _PLAIN_ROPE}),
    "llama_mha_linear": (
        "llama",
        {
            "num_key_value_heads": 4,
            "rope_parameters": _LINEAR_ROPE,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "llama3_head_dim": ("llama", {"head_dim": 20, "rope_parameters": _LLAMA3_ROPE}),
    "llama_yarn_biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": _YARN_ROPE},
    ),
    "llama_yarn_mscale_tied": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": _YARN_ROPE
            | {"truncate": False, "mscale": 1.4, "mscale_all_dim": 0.6},
        },
    ),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 20, "rope_parameters": _PLAIN_ROPE}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": _PLAIN_ROPE}),
    "qwen2_upper_windows": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rope_parameters": _YARN_ROPE,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 20, "rope_parameters": _PLAIN_ROPE}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 11,
            "sliding_window": 5,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 4.5,
            "tie_word_embeddings": True,
            "rope_parameters": _PLAIN_ROPE,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 20,
            "query_pre_attn_scalar": 13,
            "sliding_window": 6,
            "layer_types": [_SLIDING, _FULL, _SLIDING, _SLIDING],
            "final_logit_softcapping": 6.5,
            "tie_word_embeddings": True,
            "rope_parameters": {
                _FULL: _LINEAR_ROPE,
                _SLIDING: {"rope_type": "default", "rope_theta": 60.0},
            },
        },
    ),
    "olmo2": ("olmo2", {"rope_parameters": _PLAIN_ROPE}),
    "smollm3": (
        "smollm3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": [_FULL, _SLIDING, _SLIDING, _FULL],
            "rope_parameters": _PLAIN_ROPE,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What transformers gave to one layer, and what the layer made of it.

    Attributes:
      inputs, outputs: [B, T, D].
      cos, sin: [B, T, H]; 1 and 0 in a layer without positions.
      visible: [B, T, T] bool.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    visible: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model saved by transformers and what it computes.

    Attributes:
      name: key of FAMILIES.
      path: the directory that save_pretrained wrote.
      model: the torch model, float32.
      tokens: [B, T] int64.
      logits: [B, T, V].
      layers: one record a layer.
    """

    name: str
    path: Path
    model: Any
    tokens: np.ndarray
    logits: np.ndarray
    layers: list[Layer]

    @functools.cached_property
    def config(self) -> ModelConfig:
        return config_from_hf(self.checkpoint.hf_config)

    @functools.cached_property
    def checkpoint(self) -> SafetensorsCheckpoint:
        return SafetensorsCheckpoint(self.path)

    @functools.cached_property
    def params(self) -> Params:
        """Our parameters: float32, unrolled, on one device."""
        return self.load(Placement(make_mesh({"data": 1})), stacked=False)

    def load(self, place: Placement, *, stacked: bool) -> Params:
        return load_params([self.checkpoint], self.config, np.float32, place, stacked=stacked)


def make(name: str, path: Path) -> Reference:
    """Makes the model of a name, saves it in a directory and runs it in torch."""
    import torch

    model = torch_model(name)
    model.save_pretrained(path)
    tokens = np.random.default_rng(5).integers(0, model.config.vocab_size, (ROWS, LENGTH))
    records: list[dict[str, Any]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, args, kwargs, out: records.append(_record(module, args, kwargs, out)),
            with_kwargs=True,
        )
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    return Reference(name, path, model, tokens, logits, [Layer(**record) for record in records])


def torch_model(name: str) -> Any:
    """A torch model with weights, biases and norms that all matter; the same in every call."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **copy.deepcopy(_SIZES | fields))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(generator=generator)
            if key.endswith("bias"):
                weight.mul_(0.5)
            elif weight.ndim == 1:  # norms: about 1, which Gemma stores as about 0
                weight.mul_(0.3).add_(0.0 if model_type.startswith("gemma") else 1.0)
            else:  # tied embeddings too are small: the logits keep to single digits
                weight.mul_(1.5 * weight.shape[1] ** -0.5)
    return model


def _record(module: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> dict[str, Any]:
    (inputs,) = args
    cos, sin = (
        angle.expand(len(inputs), -1, -1).numpy() for angle in kwargs["position_embeddings"]
    )
    if not getattr(module.self_attn, "use_rope", True):
        cos, sin = np.ones_like(cos), np.zeros_like(sin)
    mask = kwargs["attention_mask"].expand(len(inputs), -1, -1, -1)[:, 0].numpy()
    outputs = out[0] if isinstance(out, tuple) else out
    return {
        "inputs": inputs.numpy(),
        "outputs": outputs.numpy(),
        "cos": cos,
        "sin": sin,
        "visible": mask if mask.dtype == bool else mask == 0,
    }
