"""config.json to ModelConfig and back: both spellings, round trips, and what is refused."""

import copy
import json

import pytest

from proxy_jax.errors import InputError
from proxy_jax.models.config import Rope
from proxy_jax.models.hf_config import config_from_hf, config_to_hf

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def older_spelling(hf: dict) -> dict:
    """The config.json that transformers 4 wrote for the same model."""
    hf = copy.deepcopy(hf)
    rope = hf.pop("rope_parameters")
    if hf["model_type"] == "gemma3_text":
        hf["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    hf["rope_theta"] = rope.pop("rope_theta")
    hf["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    hf["torch_dtype"] = hf.pop("dtype")
    return hf


def test_both_spellings_of_rope(reference):
    hf = older_spelling(reference.checkpoint.hf_config)
    assert "rope_parameters" not in json.dumps(hf)
    assert config_from_hf(hf) == reference.config
    if hf["rope_scaling"]:  # and the spelling of the first releases
        hf["rope_scaling"]["type"] = hf["rope_scaling"].pop("rope_type")
        assert config_from_hf(hf) == reference.config


def test_the_input_is_left_alone(reference):
    for hf in (reference.checkpoint.hf_config, older_spelling(reference.checkpoint.hf_config)):
        before = copy.deepcopy(hf)
        config_from_hf(hf)
        assert hf == before


def test_round_trip(reference):
    written = json.loads(json.dumps(config_to_hf(reference.config)))
    assert config_from_hf(written) == reference.config


def test_values_reach_their_fields(build):
    """Spelled out for the two richest families; parity with torch covers the others."""
    gemma = build("gemma3").config
    assert gemma.layer_windows == (6, None, 6, 6)
    assert [gemma.ropes[kind] for kind in gemma.layer_ropes[:2]] == [
        Rope(theta=60.0),
        Rope(theta=350.0, kind="linear", factor=2.5),
    ]
    assert gemma.query_scale == pytest.approx(13**-0.5)
    assert gemma.embedding_scale == pytest.approx(48**0.5)
    smol = build("smollm3").config
    assert [smol.ropes[kind] for kind in smol.layer_ropes] == [Rope(theta=450.0), None] * 2
    assert smol.layer_windows == (None, 6, 6, None)
    assert (smol.max_positions, smol.norm_eps, smol.tied_head) == (96, 0.013, False)


def test_defaults_of_a_sparse_config():
    """What transformers fills in where config.json says nothing."""
    gemma = config_from_hf({"model_type": "gemma3_text", "sliding_window_pattern": 3})
    assert gemma.layer_windows[:4] == (4096, 4096, None, 4096)
    assert [rope.theta for rope in gemma.ropes if rope] == [1_000_000.0, 10_000.0]
    smol = config_from_hf({"model_type": "smollm3", "num_hidden_layers": 8})
    assert [smol.ropes[kind] is None for kind in smol.layer_ropes] == [
        False,
        False,
        False,
        True,
    ] * 2
    assert smol.ropes[0] == Rope(theta=2_000_000.0)
    llama = config_from_hf({**LLAMA, "head_dim": None, "num_key_value_heads": None})
    assert (llama.head_dim, llama.num_kv_heads) == (12, 4)


def test_keys_that_the_family_does_not_read_change_nothing():
    noise = {"sliding_window": 4, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 3.0}
    assert config_from_hf(LLAMA | noise) == config_from_hf(LLAMA)
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 5}
    full = {"layer_types": ["full_attention"] * 2}
    assert config_from_hf(mistral | full).layer_windows == (5, 5)
    gemma = {"model_type": "gemma3_text"}
    assert config_from_hf(gemma | {"attn_logit_softcapping": 3.0}) == config_from_hf(gemma)


def test_a_list_of_rope_layers_may_be_longer_than_the_model():
    hf = {"model_type": "smollm3", "num_hidden_layers": 2, "no_rope_layers": [1, 0, 1, 1]}
    assert config_from_hf(hf).layer_ropes == (0, 1)
    kinds = {"layer_types": ["full_attention"] * 2}
    with pytest.raises(InputError, match="no_rope_layers has 1 entries for 2 layers"):
        config_from_hf(hf | kinds | {"no_rope_layers": [1]})


def test_vision_language_config_gives_its_text_model(build):
    hf = build("gemma3").checkpoint.hf_config
    outer = {"model_type": "gemma3", "text_config": hf, "vision_config": {"hidden_size": 5}}
    assert config_from_hf(outer) == build("gemma3").config
    with pytest.raises(InputError, match="text_config"):
        config_from_hf({"model_type": "gemma3"})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"model_type": None}, "None"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"hidden_act": "gelu"}, "'gelu'"),  # the exact one, not its tanh approximation
        ({"model_type": "gemma2", "hidden_activation": "gelu_new"}, "'gelu_new'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "'su'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "base": 3.0}}, "'base'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]},
            "chunked_attention",
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_what_is_not_understood_is_named(fields, named):
    with pytest.raises(InputError, match=named) as caught:
        config_from_hf(LLAMA | fields, "somewhere/config.json")
    assert str(caught.value).startswith("somewhere/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be between 1 and 1000, not 0"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers must be between 1 and 1000"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers must be between 1 and 1000, not an"),
        ({"hidden_size": 10**9}, "hidden_size must be between 1 and 1000000"),
        ({"hidden_size": 0}, "hidden_size must be between 1"),
        ({"hidden_size": 2}, "hidden size"),
        ({"intermediate_size": -1}, "intermediate_size must be between 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be between 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be between 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"head_dim": 0}, "head_dim must be between 1"),
        ({"head_dim": 3}, "head_dim must be even, not 3"),
        ({"vocab_size": 10**8}, "vocab_size must be between 1 and 10000000"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be between 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 3}, "attention_bias"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"model_type": "mistral", "sliding_window": -3}, "sliding_window must be between 1"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be between 1"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2},
            "sliding_window is missing",
        ),
        ({"model_type": "qwen3", "layer_types": [3, 4]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": "full_attention"}, "layer_types"),
        ({"model_type": "smollm3", "no_rope_layers": [1, "0"]}, "no_rope_layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers must hold 0 and 1"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "not a config of a smollm3"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be abo"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -5.0}, "attn_logit_softcapping must"),
        ({"model_type": "gemma2", "final_logit_softcapping": "x"}, "final_logit_softcapping"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}}, "beta_fast must"),
        (
            {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_theta 1 leaves yarn",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "high_freq_factor must be above 4",
        ),
        ({"rope_scaling": {"rope_type": "factors", "factors": [1.0] * 5}}, "expected 6: half"),
        ({"rope_scaling": {"rope_type": "factors", "factors": [0.0] * 6}}, "must be above 0"),
        ({"rope_scaling": {"rope_type": "factors", "factors": 2.0}}, "factors must be a list"),
        ({"per_layer_config": {"0": {"intermediate_size": 4}}}, "per_layer_config"),
    ],
)
def test_values_are_checked(fields, message):
    with pytest.raises(InputError, match=f"^f.json: .*{message}") as caught:
        config_from_hf(LLAMA | fields, "f.json")
    assert "\n" not in str(caught.value)


def test_what_no_decoder_needs_is_not_made():
    """transformers makes a name for each of these labels."""
    assert config_from_hf(LLAMA | {"num_labels": 10**12}) == config_from_hf(LLAMA)


def test_nesting_without_end_is_refused():
    nested: dict = {}
    for _ in range(100_000):
        nested = {"a": nested}
    with pytest.raises(InputError, match="not a config of a llama model"):
        config_from_hf(LLAMA | {"extra": nested})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        # As the recipes of Qwen2.5 and Qwen3 leave it; vLLM's limits.
        ({"max_position_embeddings": 64, "rope_scaling": YARN}, 256),
        ({"max_position_embeddings": 80, "rope_scaling": YARN}, 256),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
        # As those who trained with the stretched context leave it.
        ({"max_position_embeddings": 256, "rope_scaling": YARN}, 256),
        ({"max_position_embeddings": 300, "rope_scaling": YARN}, 300),
        ({"max_position_embeddings": 256, "rope_scaling": YARN | {"factor": None}}, 256),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.5}}, 160),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2.4}}, 240),
        ({"max_position_embeddings": 3, "rope_scaling": {"type": "linear", "factor": 1.1}}, 3),
        ({"max_position_embeddings": 64}, 64),
        (
            {
                "max_position_embeddings": 64,
                "rope_scaling": YARN
                | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            },
            64,
        ),
    ],
)
def test_contexts_that_a_rope_stretches(fields, positions):
    config = config_from_hf(LLAMA | fields)
    assert config.max_positions == positions
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == config


def test_gemma3s_context_is_the_stretched_one(build):
    gemma = build("gemma3")
    assert gemma.config.ropes[0] == Rope(theta=350.0, kind="linear", factor=2.5)
    assert gemma.config.max_positions == gemma.model.config.max_position_embeddings == 96


def test_export_refuses_what_config_json_cannot_say(build):
    hf = copy.deepcopy(build("gemma3").checkpoint.hf_config)
    hf["rope_parameters"]["sliding_attention"] |= {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(InputError, match="'linear' of sliding layers"):
        config_to_hf(config_from_hf(hf))
    factors = {"rope_type": "factors", "factors": [1.0, 1.0, 2.0, 2.5, 3.0, 4.0]}
    config = config_from_hf(LLAMA | {"rope_scaling": factors})
    assert config.ropes == (Rope(kind="factors", factors=(1.0, 1.0, 2.0, 2.5, 3.0, 4.0)),)
    with pytest.raises(InputError, match="rope factor"):
        config_to_hf(config)
