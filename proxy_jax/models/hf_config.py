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
from proxy_jax.reading import Fields, reading, shown

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
# The longest context that int32 positions count, in use wherever none is named.
_MOST_POSITIONS = 2**31 - 1
# Sizes far beyond every published model. More is a damaged file, and is refused before lists of
# that length are made of it.
LARGEST = {
    "num_hidden_layers": 1_000,
    "hidden_size": 10**6,
    "intermediate_size": 10**6,
    "num_attention_heads": 10**6,
    "num_key_value_heads": 10**6,
    "head_dim": 10**6,
    "vocab_size": 10**7,
    "max_position_embeddings": _MOST_POSITIONS,
}
# Settings under which the layers would compute something else than the Decoder does.
_UNSUPPORTED = ("use_bidirectional_attention", "per_layer_config")
# Keys that transformers makes lists of, or acts upon, and that say nothing of a decoder.
_NOT_OF_DECODERS = ("model_type", "num_labels", "id2label", "label2id", "quantization_config")


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
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{source}: model_type {shown(model_type)} is not supported; "
            f"known: {', '.join(FAMILIES)}"
        )
    for key in LARGEST:
        _size(Fields(source, hf), key, default=None)
    for key in _UNSUPPORTED:
        if hf.get(key):
            raise InputError(f"{source}: {key} is not supported")
    full = Fields(source, _with_defaults(hf, model_type, source))
    gemma = model_type in _GEMMA

    activation = full.choice("hidden_activation" if gemma else "hidden_act", tuple(_ACTIVATIONS))
    model_dim = _size(full, "hidden_size")
    num_heads = _size(full, "num_attention_heads")
    num_kv_heads = _size(full, "num_key_value_heads", default=num_heads)
    head_dim = _size(full, "head_dim", default=model_dim // num_heads)
    if num_heads % num_kv_heads:
        raise InputError(
            f"{source}: num_key_value_heads {num_kv_heads} does not divide "
            f"num_attention_heads {num_heads}"
        )
    if head_dim < 2 or head_dim % 2:
        raise InputError(f"{source}: head_dim must be even, not {head_dim}")
    bias = full.flag("attention_bias", default=False)
    ropes, layer_ropes = _ropes(full, model_type, head_dim)
    return ModelConfig(
        family=model_type,
        vocab_size=_size(full, "vocab_size"),
        num_layers=_size(full, "num_hidden_layers"),
        model_dim=model_dim,
        mlp_dim=_size(full, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=_max_positions(full, model_type, ropes[0]),
        norm_eps=full.real("rms_norm_eps", above=0),
        ropes=ropes,
        layer_ropes=layer_ropes,
        layer_windows=_windows(full, model_type),
        query_scale=(full.real("query_pre_attn_scalar", above=0) if gemma else head_dim) ** -0.5,
        norms="sandwich" if gemma else "post" if model_type == "olmo2" else "pre",
        norm_unit_offset=gemma,
        qk_norm={"qwen3": "head", "gemma3_text": "head", "olmo2": "projection"}.get(
            model_type, "none"
        ),  # type: ignore[arg-type]
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        tied_head=full.flag("tie_word_embeddings", default=False),
        qkv_bias=bias or model_type == "qwen2",
        out_bias=bias,
        mlp_bias=full.flag("mlp_bias", default=False),
        embedding_scale=math.sqrt(model_dim) if gemma else None,
        # Gemma 3 has the first key as well, and transformers does not look at it.
        attention_softcap=_softcap(full, "attn_logit_softcapping", model_type == "gemma2"),
        final_softcap=_softcap(full, "final_logit_softcapping", gemma),
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
        "max_position_embeddings": _unstretched(config),
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


def _size(fields: Fields, key: str, **default: int | None) -> Any:
    return fields.integer(key, 1, LARGEST[key], **default)


def _softcap(full: Fields, key: str, used: bool) -> float | None:
    return full.real(key, above=0, default=None) if used else None


def _with_defaults(hf: dict[str, Any], model_type: str, source: str) -> dict[str, Any]:
    from transformers import AutoConfig

    with reading(source, f"not a config of a {model_type} model"):
        # A copy, because transformers writes defaults into the nested dicts that it is given.
        fields = {k: copy.deepcopy(v) for k, v in hf.items() if k not in _NOT_OF_DECODERS}
        scaling: Any = (Fields(source, fields).inner("rope_scaling") or Fields(source, {})).fields
        if "type" in scaling:  # the first spelling, which transformers 5 misses in Gemma 3
            scaling.setdefault("rope_type", scaling["type"])
        factors = scaling.get("rope_type") == "factors"  # unknown to transformers: ours
        if factors:
            del fields["rope_scaling"]
        full = AutoConfig.for_model(model_type, **fields).to_dict()
        if factors:
            full["rope_parameters"] = {**full["rope_parameters"], **scaling}
    return full


def _text_config(hf: dict[str, Any], source: str) -> dict[str, Any]:
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise InputError(f"{source}: text_config is missing, although model_type is 'gemma3'")
    return text


def _windows(full: Fields, model_type: str) -> tuple[int | None, ...]:
    layers = _size(full, "num_hidden_layers")
    if model_type == "mistral":
        return (_window(full),) * layers
    if model_type not in _LAYER_TYPES:
        return (None,) * layers
    kinds = _layer_types(full)
    if "sliding_attention" not in kinds:
        return (None,) * layers
    window = _window(full)
    if window is None:
        raise InputError(
            f"{full.where}: sliding_window is missing, but layer_types has sliding layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(full: Fields) -> int | None:
    return full.integer("sliding_window", 1, _MOST_POSITIONS, default=None)


def _layer_types(full: Fields) -> tuple[str, ...]:
    kinds, layers = full.array("layer_types", str), _size(full, "num_hidden_layers")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(f"{full.where}: layer type {shown(min(unknown))} is not supported")
    if len(kinds) != layers:
        raise InputError(f"{full.where}: layer_types has {len(kinds)} entries for {layers} layers")
    return kinds


def _ropes(
    full: Fields, model_type: str, head_dim: int
) -> tuple[tuple[Rope | None, ...], tuple[int, ...]]:
    """The kinds of rope and, per layer, which it uses."""
    parameters = _inner(full, "rope_parameters")
    layers = _size(full, "num_hidden_layers")
    if model_type == "gemma3_text":
        both = (
            _rope(_inner(parameters, "full_attention"), full, head_dim),
            _rope(_inner(parameters, "sliding_attention"), full, head_dim),
        )
        return both, tuple(int(kind == "sliding_attention") for kind in _layer_types(full))
    rope = _rope(parameters, full, head_dim)
    if model_type == "smollm3":
        # transformers allows more entries than layers
        used = full.array("no_rope_layers", int)[:layers]
        if len(used) < layers:
            raise InputError(
                f"{full.where}: no_rope_layers has {len(used)} entries for {layers} layers"
            )
        if set(used) - {0, 1}:
            raise InputError(f"{full.where}: no_rope_layers must hold 0 and 1 only")
        return (rope, None), tuple(int(not uses) for uses in used)
    return (rope,), (0,) * layers


def _inner(fields: Fields, key: str) -> Fields:
    inner = fields.inner(key)
    if inner is None:
        raise InputError(f"{fields.where}: {key} is missing")
    return inner


def _rope(parameters: Fields, full: Fields, head_dim: int) -> Rope:
    source = full.where
    kind = parameters.fields.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise InputError(
            f"{source}: rope type {shown(kind)} is not supported; known: {', '.join(_ROPE_KEYS)}"
        )
    unknown = set(parameters.fields) - _ROPE_KEYS[kind] - _ROPE_NEUTRAL
    if unknown and kind != "default":
        raise InputError(f"{source}: rope setting {shown(min(unknown))} of {kind} is unknown")
    if parameters.real("partial_rotary_factor", default=1.0) != 1.0:
        raise InputError(f"{source}: partial_rotary_factor other than 1 is not supported")

    theta = float(parameters.real("rope_theta", above=0))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "factors":
        return Rope(theta=theta, kind="factors", factors=_factors(parameters, head_dim))
    positions = _size(full, "max_position_embeddings")
    original = parameters.integer(
        "original_max_position_embeddings", 1, _MOST_POSITIONS, default=positions
    )
    # yarn may leave it to the ratio of the two contexts
    ratio = {"default": positions / original} if kind == "yarn" else {}
    factor = float(parameters.real("factor", above=0, **ratio))
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=factor)
    if kind == "llama3":
        low = float(parameters.real("low_freq_factor", above=0))
        return Rope(
            theta=theta,
            kind="llama3",
            factor=factor,
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=float(parameters.real("high_freq_factor", above=low)),
        )
    if theta == 1:
        raise InputError(f"{parameters.where}: rope_theta 1 leaves yarn no wavelengths")
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=float(parameters.real("beta_fast", above=0, default=32)),
        beta_slow=float(parameters.real("beta_slow", above=0, default=1)),
        truncate=parameters.flag("truncate", default=True),
        attention_factor=_yarn_attention_factor(parameters, factor),
    )


def _factors(parameters: Fields, head_dim: int) -> tuple[float, ...]:
    factors = parameters.array("factors", float)
    if len(factors) != head_dim // 2:
        raise InputError(
            f"{parameters.where}: factors has {len(factors)} entries, expected {head_dim // 2}: "
            "half the head size"
        )
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise InputError(f"{parameters.where}: factors must be above 0")
    return factors


def _max_positions(full: Fields, model_type: str, rope: Rope | None) -> int:
    """The context that the model supports, with what its rope stretches it to.

    A linear or yarn setting is added to a config whose max_position_embeddings stays that of the
    pretraining, as the families' documentation asks for; vLLM reads it so, too. Where yarn's is
    the stretched one already, the larger counts. Gemma 3's linear one always is.
    """
    positions = _size(full, "max_position_embeddings")
    if rope is not None and rope.kind == "yarn":
        positions = max(positions, int(rope.original_max_positions * rope.factor))
    elif rope is not None and rope.kind == "linear" and model_type != "gemma3_text":
        positions = max(positions, int(positions * rope.factor))
    return min(positions, _MOST_POSITIONS)


def _unstretched(config: ModelConfig) -> int:
    """max_position_embeddings from which `_max_positions` makes the config's."""
    rope, positions = config.ropes[0], config.max_positions
    if rope is None or rope.kind != "linear" or config.family == "gemma3_text" or rope.factor <= 1:
        return positions  # a yarn setting names the original context itself
    original = int(positions / rope.factor)
    return original if int(original * rope.factor) == positions else original + 1


def _yarn_attention_factor(parameters: Fields, factor: float) -> float:
    given = parameters.real("attention_factor", above=0, default=None)
    if given is not None:
        return float(given)

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = (
        parameters.real(key, low=0, default=None) for key in ("mscale", "mscale_all_dim")
    )
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
