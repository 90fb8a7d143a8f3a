"""ModelConfig from and to a Hugging Face config.json.

transformers fills in the defaults that a config.json leaves out and folds the RoPE spellings of
its versions 4 and 5 into one; what it cannot know, that our Decoder computes the same function,
is checked here field by field, and anything not understood is an error.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig, Rope

# model_type -> architecture name that exports carry.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_GEMMA = ("gemma2", "gemma3_text")
# Families whose layers see sliding windows as layer_types says; in the others the keys are noise.
_LAYER_TYPES = ("qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "factors": {"factors"},
}
# Keys of a rope setting that do not change the function we compute.
_ROPE_NEUTRAL = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def config_from_hf(hf: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads the architecture from a config.json.

    Args:
      hf: the parsed config.json, in the spelling of transformers 4 or 5.
      source: named in errors.

    Raises:
      InputError: an architecture, activation, rope type or option that the Decoder does not have.
    """
    model_type = hf.get("model_type")
    if model_type == "gemma3":  # a vision-language checkpoint: its text model
        hf = {**_text_config(hf, source), "model_type": "gemma3_text"}
        model_type = "gemma3_text"
    if model_type not in FAMILIES:
        raise InputError(
            f"{source}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    full = _with_defaults(hf, model_type, source)
    gemma = model_type in _GEMMA

    activation = full["hidden_activation"] if gemma else full["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise InputError(
            f"{source}: activation {activation!r} is not supported; "
            f"known: {', '.join(_ACTIVATIONS)}"
        )
    if full.get("use_bidirectional_attention"):
        raise InputError(f"{source}: use_bidirectional_attention is not supported in a decoder")

    num_heads = full["num_attention_heads"]
    head_dim = full.get("head_dim") or full["hidden_size"] // num_heads
    bias = bool(full.get("attention_bias", False))
    ropes, layer_ropes = _ropes(full, model_type, source)
    return ModelConfig(
        family=model_type,
        vocab_size=full["vocab_size"],
        num_layers=full["num_hidden_layers"],
        model_dim=full["hidden_size"],
        mlp_dim=full["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=full.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        max_positions=full["max_position_embeddings"],
        norm_eps=full["rms_norm_eps"],
        ropes=ropes,
        layer_ropes=layer_ropes,
        layer_windows=_windows(full, model_type, source),
        query_scale=(full["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        norms="sandwich" if gemma else "post" if model_type == "olmo2" else "pre",
        norm_unit_offset=gemma,
        qk_norm={"qwen3": "head", "gemma3_text": "head", "olmo2": "projection"}.get(
            model_type, "none"
        ),  # type: ignore[arg-type]
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        tied_head=bool(full["tie_word_embeddings"]),
        qkv_bias=bias or model_type == "qwen2",
        out_bias=bias,
        mlp_bias=bool(full.get("mlp_bias", False)),
        embedding_scale=math.sqrt(full["hidden_size"]) if gemma else None,
        # Gemma 3 has the first key as well, and transformers does not look at it.
        attention_softcap=full["attn_logit_softcapping"] if model_type == "gemma2" else None,
        final_softcap=full["final_logit_softcapping"] if gemma else None,
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers reads back as the same architecture.

    RoPE is written in the older spelling, which transformers 4 and 5 and other tools all read.

    Raises:
      InputError: the config has per-dimension rope factors, which config.json cannot say.
    """
    hf: dict[str, Any] = {
        "architectures": [FAMILIES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
    }
    activation = "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation
    gemma = config.family in _GEMMA
    hf["hidden_activation" if gemma else "hidden_act"] = activation
    if gemma:
        hf["query_pre_attn_scalar"] = round(config.query_scale**-2)  # transformers: an integer
        hf["attn_logit_softcapping"] = config.attention_softcap
        hf["final_logit_softcapping"] = config.final_softcap

    windows = [window for window in config.layer_windows if window is not None]
    hf["sliding_window"] = windows[0] if windows else None
    if config.family != "mistral":
        hf["use_sliding_window"] = bool(windows)
        hf["layer_types"] = [
            "full_attention" if window is None else "sliding_attention"
            for window in config.layer_windows
        ]
    if config.family == "smollm3":
        hf["no_rope_layers"] = [int(config.ropes[i] is not None) for i in config.layer_ropes]

    rope = config.ropes[0]
    assert rope is not None, "the first kind of rope is never 'none'"
    hf["rope_theta"] = rope.theta
    hf["rope_scaling"] = _rope_to_hf(rope)
    if config.family == "gemma3_text":
        local = config.ropes[1]
        assert local is not None
        if local.kind != "default":
            raise InputError(f"export: rope type {local.kind!r} of sliding layers has no spelling")
        hf["rope_local_base_freq"] = local.theta
    return hf


def _with_defaults(hf: dict[str, Any], model_type: str, source: str) -> dict[str, Any]:
    from transformers import AutoConfig

    # A copy, because transformers writes defaults into the nested dicts that it is given.
    fields = {k: copy.deepcopy(v) for k, v in hf.items() if k != "model_type"}
    scaling = fields.get("rope_scaling") or {}
    if "type" in scaling:  # the first spelling, which transformers 5 misses in Gemma 3
        scaling.setdefault("rope_type", scaling["type"])
    factors = scaling.get("rope_type") == "factors"  # unknown to transformers: ours
    if factors:
        del fields["rope_scaling"]
    try:
        full = AutoConfig.for_model(model_type, **fields).to_dict()
    except Exception as error:  # transformers raises many kinds for a config it cannot read
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{source}: not a config of a {model_type} model ({reason})") from error
    if factors:
        full["rope_parameters"] = {**full["rope_parameters"], **scaling}
    return full


def _text_config(hf: dict[str, Any], source: str) -> dict[str, Any]:
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise InputError(f"{source}: text_config is missing, although model_type is 'gemma3'")
    return text


def _windows(full: dict[str, Any], model_type: str, source: str) -> tuple[int | None, ...]:
    if model_type == "mistral":
        return (full["sliding_window"],) * full["num_hidden_layers"]
    if model_type not in _LAYER_TYPES:
        return (None,) * full["num_hidden_layers"]
    window, kinds = full["sliding_window"], full["layer_types"]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(f"{source}: layer type {sorted(unknown)[0]!r} is not supported")
    if len(kinds) != full["num_hidden_layers"]:
        raise InputError(
            f"{source}: layer_types has {len(kinds)} entries for {full['num_hidden_layers']} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ropes(
    full: dict[str, Any], model_type: str, source: str
) -> tuple[tuple[Rope | None, ...], tuple[int, ...]]:
    """The kinds of rope and, per layer, which it uses."""
    parameters = full["rope_parameters"]
    layers = full["num_hidden_layers"]
    if model_type == "gemma3_text":
        both = (
            _rope(parameters["full_attention"], full, source),
            _rope(parameters["sliding_attention"], full, source),
        )
        return both, tuple(int(kind == "sliding_attention") for kind in full["layer_types"])
    rope = _rope(parameters, full, source)
    if model_type == "smollm3":
        used = full["no_rope_layers"][:layers]  # transformers allows more entries than layers
        if len(used) < layers:
            raise InputError(
                f"{source}: no_rope_layers has {len(used)} entries for {layers} layers"
            )
        return (rope, None), tuple(int(not uses) for uses in used)
    return (rope,), (0,) * layers


def _rope(parameters: dict[str, Any], full: dict[str, Any], source: str) -> Rope:
    kind = parameters["rope_type"]
    if kind not in _ROPE_KEYS:
        raise InputError(
            f"{source}: rope type {kind!r} is not supported; known: {', '.join(_ROPE_KEYS)}"
        )
    unknown = set(parameters) - _ROPE_KEYS[kind] - _ROPE_NEUTRAL
    if unknown and kind != "default":
        raise InputError(f"{source}: rope setting {sorted(unknown)[0]!r} of {kind} is unknown")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{source}: partial_rotary_factor other than 1 is not supported")

    def value(key: str, default: float) -> Any:
        found = parameters.get(key)
        return default if found is None else found

    theta = float(parameters["rope_theta"])
    original = int(value("original_max_position_embeddings", full["max_position_embeddings"]))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "factors":
        return Rope(theta=theta, kind="factors", factors=tuple(parameters["factors"]))
    factor = parameters.get("factor")
    if factor is None:  # yarn may leave it to the ratio of the two contexts
        factor = full["max_position_embeddings"] / original
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=float(factor))
    if kind == "llama3":
        return Rope(
            theta=theta,
            kind="llama3",
            factor=float(factor),
            original_max_positions=original,
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
        )
    return Rope(
        theta=theta,
        kind="yarn",
        factor=float(factor),
        original_max_positions=original,
        beta_fast=float(value("beta_fast", 32)),
        beta_slow=float(value("beta_slow", 1)),
        truncate=bool(value("truncate", True)),
        attention_factor=_yarn_attention_factor(parameters, float(factor)),
    )


def _yarn_attention_factor(parameters: dict[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def _rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    if rope.kind == "factors":
        raise InputError(
            "export: the model has one rope factor a dimension (from a GGUF file), "
            "which config.json cannot say; load it from its Hugging Face directory instead"
        )
    hf: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        hf["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        hf |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        hf |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
            "attention_factor": rope.attention_factor,
        }
    return hf
