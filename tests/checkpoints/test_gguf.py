import struct
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from proxy_jax.checkpoints.gguf import GGUFCheckpoint
from proxy_jax.errors import InputError
from proxy_jax.models.hf_config import config_from_hf

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, VOCAB = 2, 32, 64, 4, 2, 10
HEAD = HIDDEN // HEADS


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def hf_llama():
    """Weights of a tiny Llama in the Hugging Face layout."""
    weights = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": random(HIDDEN),
    }
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    for layer in range(LAYERS):
        for module, shape in shapes.items():
            weights[f"model.layers.{layer}.{module}.weight"] = random(*shape) + layer
    return weights


GGUF_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(hf_name):
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if hf_name in top:
        return top[hf_name]
    _, _, layer, *module, kind = hf_name.split(".")
    return f"blk.{layer}.{GGUF_MODULES['.'.join(module)]}.{kind}"


def interleave(weight, heads):
    """Row by row: the two halves of every head become its even and odd rows."""
    out = np.empty_like(weight)
    half = len(weight) // heads // 2
    for head in range(heads):
        for i in range(half):
            out[head * 2 * half + 2 * i] = weight[head * 2 * half + i]
            out[head * 2 * half + 2 * i + 1] = weight[head * 2 * half + half + i]
    return out


def converted(weights):
    """What the converter stores for a Llama: q and k interleaved."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    return {
        gguf_name(name): interleave(value, heads[name.split(".")[-2]])
        if name.split(".")[-2] in heads
        else value
        for name, value in weights.items()
    }


def write(path, tensors, arch="llama", drop=(), extra=None):
    writer = gguf.GGUFWriter(path, arch)
    keys = {
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "context_length": 128,
    }
    for key, value in ({k: v for k, v in keys.items() if k not in drop} | (extra or {})).items():
        add: Any = {
            float: writer.add_float32,
            bool: writer.add_bool,
            int: writer.add_uint32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(key if key.startswith(("tokenizer.", "split.")) else f"{arch}.{key}", value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def llama(tmp_path):
    return write(tmp_path / "llama.gguf", converted(hf_llama()))


def test_llama_tensors_are_those_of_the_hf_checkpoint(llama):
    checkpoint = GGUFCheckpoint(llama)
    weights = hf_llama()
    assert set(checkpoint.names) == set(weights)
    for name, expected in weights.items():
        assert checkpoint.shape(name) == expected.shape
        np.testing.assert_array_equal(checkpoint.read(name), expected)


@pytest.mark.parametrize("rows", [slice(3, 11), slice(0, 16, 3), slice(None), slice(5, 5)])
def test_slices_equal_slices_of_the_whole(llama, rows):
    checkpoint = GGUFCheckpoint(llama)
    for name in checkpoint.names:
        whole = checkpoint.read(name)
        index = (rows, slice(4, 20))[: whole.ndim]
        np.testing.assert_array_equal(checkpoint.read(name, index), whole[index])
        np.testing.assert_array_equal(checkpoint.read(name, (rows,)), whole[rows])


def test_a_row_slice_dequantises_those_rows_only(tmp_path, monkeypatch):
    data = gguf.quants.quantize(random(5000, 32), Kind.Q8_0)
    tensors = {**converted(hf_llama()), "token_embd.weight": (data, Kind.Q8_0)}
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))
    seen = []

    def counting(rows, kind):
        seen.append(len(rows))
        return gguf.quants.dequantize(rows, kind)

    monkeypatch.setattr("proxy_jax.checkpoints.gguf.dequantize", counting)
    whole = checkpoint.read("model.embed_tokens.weight")
    assert whole.shape == (5000, 32)
    assert sum(seen) == 5000
    assert len(seen) > 1
    seen.clear()
    part = checkpoint.read("model.embed_tokens.weight", (slice(4000, 4003), slice(1, 3)))
    assert seen == [3]
    np.testing.assert_array_equal(part, whole[4000:4003, 1:3])


def test_llama_config(llama):
    config = GGUFCheckpoint(llama).hf_config
    expected = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    assert {key: config[key] for key in expected} == expected
    assert "eos_token_id" not in config


def test_rope_scalings(tmp_path):
    def scaling(extra=None, tensors=()):
        weights = {**converted(hf_llama()), **dict(tensors)}
        checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", weights, extra=extra))
        assert set(checkpoint.names) == set(hf_llama())
        return checkpoint.hf_config["rope_scaling"]

    factors = np.array([1, 1.5, 2, 8], np.float32)
    assert scaling(tensors=[("rope_freqs.weight", factors)]) == {
        "rope_type": "factors",
        "factors": [1.0, 1.5, 2.0, 8.0],
    }
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    assert scaling(linear) == {"rope_type": "linear", "factor": 8.0}
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 16.0,
    }
    assert scaling(yarn) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
    }
    with pytest.raises(InputError, match=r"rope\.scaling\.type 'longrope' is not supported"):
        scaling({"rope.scaling.type": "longrope"})


GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def test_gemma3_norms_and_config(tmp_path):
    def layer_names(layer):
        names = {
            f"blk.{layer}.{g}.weight": f"model.layers.{layer}.{h}.weight"
            for g, h in GEMMA_NORMS.items()
        }
        qk = {
            f"blk.{layer}.attn_{x}_norm.weight": f"model.layers.{layer}.self_attn.{x}_norm.weight"
            for x in "qk"
        }
        return names | qk

    norms = {g: h for layer in range(6) for g, h in layer_names(layer).items()}
    norms["output_norm.weight"] = "model.norm.weight"
    hf = {h: random(HEAD if "_norm" in h else HIDDEN) for h in norms.values()}
    embedding = random(VOCAB, HIDDEN)
    tensors = {g: hf[h] + np.float32(1) for g, h in norms.items()}
    tensors |= {"token_embd.weight": embedding, "blk.0.attn_q.weight": random(HIDDEN, HIDDEN)}
    extra = {
        "block_count": 6,
        "attention.sliding_window": 16,
        "attention.key_length": 16,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    checkpoint = GGUFCheckpoint(write(tmp_path / "g.gguf", tensors, "gemma3", extra=extra))
    for name, expected in hf.items():
        np.testing.assert_allclose(checkpoint.read(name), expected, atol=1e-6)
    np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight"), embedding)
    # Gemma rotates halves, so q is stored as it is.
    np.testing.assert_array_equal(
        checkpoint.read("model.layers.0.self_attn.q_proj.weight"), tensors["blk.0.attn_q.weight"]
    )
    expected_config = {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    config = checkpoint.hf_config
    assert {key: config[key] for key in expected_config} == expected_config


def test_gemma2_config(tmp_path):
    path = write(tmp_path / "g.gguf", {"token_embd.weight": random(VOCAB, HIDDEN)}, "gemma2")
    config = GGUFCheckpoint(path).hf_config
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)


def test_biases_untied_head_and_plain_order_of_qwen2(tmp_path):
    weights = hf_llama()
    bias = random(HIDDEN)
    tensors = {gguf_name(name): value for name, value in weights.items()}
    tensors |= {"blk.0.attn_q.bias": bias, "output.weight": random(VOCAB, HIDDEN)}
    checkpoint = GGUFCheckpoint(write(tmp_path / "q.gguf", tensors, "qwen2"))
    q = "model.layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(checkpoint.read(f"{q}.weight"), weights[f"{q}.weight"])
    np.testing.assert_array_equal(checkpoint.read(f"{q}.bias"), bias)
    assert "lm_head.weight" in checkpoint.names
    assert not checkpoint.hf_config["tie_word_embeddings"]


def test_smollm3_and_olmo2(tmp_path):
    smollm3 = GGUFCheckpoint(write(tmp_path / "s.gguf", converted(hf_llama()), "smollm3"))
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(smollm3.read(name), hf_llama()[name])
    assert smollm3.hf_config["no_rope_layers"] == [1, 1]
    tensors = {
        "token_embd.weight": random(VOCAB, HIDDEN),
        "blk.0.post_ffw_norm.weight": random(HIDDEN),
    }
    olmo2 = GGUFCheckpoint(write(tmp_path / "o.gguf", tensors, "olmo2"))
    assert olmo2.names[1] == "model.layers.0.post_feedforward_layernorm.weight"


@pytest.mark.parametrize(
    ("arch", "modules"),
    [
        ("llama", "input_layernorm post_attention_layernorm"),
        ("smollm3", "input_layernorm post_attention_layernorm"),
        ("qwen2", "input_layernorm post_attention_layernorm"),
        ("qwen3", "input_layernorm post_attention_layernorm self_attn.q_norm self_attn.k_norm"),
        (
            "gemma2",
            "input_layernorm post_attention_layernorm"
            " pre_feedforward_layernorm post_feedforward_layernorm",
        ),
        (
            "gemma3",
            "input_layernorm post_attention_layernorm pre_feedforward_layernorm"
            " post_feedforward_layernorm self_attn.q_norm self_attn.k_norm",
        ),
        (
            "olmo2",
            "post_attention_layernorm post_feedforward_layernorm self_attn.q_norm self_attn.k_norm",
        ),
    ],
)
def test_names_are_those_of_the_converter(tmp_path, arch, modules):
    linears = [name for name in GGUF_MODULES if name.endswith("proj")]
    expected = ["model.embed_tokens.weight", "model.norm.weight"]
    expected += ["lm_head.weight"] * (arch != "gemma2")  # Gemma 2's converter knows no head
    expected += [f"model.layers.1.{module}.weight" for module in [*linears, *modules.split()]]
    enum = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(enum, LAYERS)
    stored = {table.get_name(name, try_suffixes=(".weight",)): random(4, 4) for name in expected}
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", stored, arch))
    assert checkpoint.names == tuple(expected)
    config = config_from_hf(checkpoint.hf_config)
    assert (config.num_layers, config.mlp_dim, config.tied_head) == (LAYERS, MLP, arch == "gemma2")


def embedding_of(tmp_path, data, kind):
    tensors = {**converted(hf_llama()), "token_embd.weight": (data, kind)}
    checkpoint = GGUFCheckpoint(write(tmp_path / f"{kind.name}.gguf", tensors))
    return checkpoint.read("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("kind", "bound"),
    # Half a step of the largest block, which spans at most 2 x 4 standard deviations.
    [
        (Kind.F32, 0),
        (Kind.F16, 2e-3),
        (Kind.BF16, 2e-2),
        (Kind.Q4_0, 0.35),
        (Kind.Q4_1, 0.3),
        (Kind.Q5_0, 0.18),
        (Kind.Q5_1, 0.15),
        (Kind.Q8_0, 0.02),
    ],
)
def test_types_that_can_be_quantised_here(tmp_path, kind, bound):
    values = np.clip(random(VOCAB, 64), -4, 4)
    read = embedding_of(tmp_path, gguf.quants.quantize(values, kind), kind)
    assert read.dtype == np.float32
    assert read.shape == values.shape
    np.testing.assert_allclose(read, values, rtol=0, atol=bound)


def scales_min_k4(scales, mins):
    """Packs eight 6-bit scales and minima into the 12 bytes of Q4_K and Q5_K."""
    packed = [s & 63 | (hi_s >> 4) << 6 for s, hi_s in zip(scales[:4], scales[4:], strict=True)]
    packed += [m & 63 | (hi_m >> 4) << 6 for m, hi_m in zip(mins[:4], mins[4:], strict=True)]
    packed += [s & 15 | (m & 15) << 4 for s, m in zip(scales[4:], mins[4:], strict=True)]
    return bytes(packed)


def k_block(kind, rng):
    """Bytes of one random 256-value block and its values, from the format's definition."""
    step, offset = np.float16(0.03), np.float16(0.02)
    if kind == Kind.Q6_K:
        q = rng.integers(0, 64, 256)
        scales = rng.integers(-128, 128, 16)
        low, high = bytearray(128), bytearray(64)
        for i, value in enumerate(q):
            half, quarter, at = i // 128, i % 128 // 32, i % 32
            low[64 * half + 32 * (quarter % 2) + at] |= int(value & 15) << (4 * (quarter // 2))
            high[32 * half + at] |= int(value >> 4) << (2 * quarter)
        data = bytes(low) + bytes(high) + scales.astype(np.int8).tobytes() + step.tobytes()
        return data, np.float32(step) * scales.repeat(16) * (q - 32)
    bits = 4 if kind == Kind.Q4_K else 5
    q = rng.integers(0, 1 << bits, 256)
    scales, mins = rng.integers(0, 64, 8), rng.integers(0, 64, 8)
    low, high = bytearray(128), bytearray(32)
    for i, value in enumerate(q):
        group, at = i // 32, i % 32
        low[32 * (group // 2) + at] |= int(value & 15) << (4 * (group % 2))
        high[at] |= int(value >> 4) << group
    packed = scales_min_k4(scales.tolist(), mins.tolist())
    data = step.tobytes() + offset.tobytes() + packed
    data += bytes(low) if bits == 4 else bytes(high) + bytes(low)
    values = np.float32(step) * scales.repeat(32) * q - np.float32(offset) * mins.repeat(32)
    return data, values


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_types_against_the_format(tmp_path, kind):
    rng = np.random.default_rng(0)
    blocks = [k_block(kind, rng) for _ in range(6)]
    data = np.frombuffer(b"".join(data for data, _ in blocks), np.uint8).reshape(3, -1)
    expected = np.stack([values for _, values in blocks]).reshape(3, 512)
    np.testing.assert_allclose(embedding_of(tmp_path, data, kind), expected, rtol=1e-5, atol=1e-5)


def fails(path, *words):
    with pytest.raises(InputError) as error:
        GGUFCheckpoint(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_errors_of_the_file(tmp_path, llama):
    whole = llama.read_bytes()
    bad = tmp_path / "bad.gguf"
    fails(bad, "No such file")
    bad.write_bytes(b"")
    fails(bad, "not a readable GGUF file")
    bad.write_bytes(b"PK\x03\x04" + whole[4:])
    fails(bad, "not a GGUF file")
    bad.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    fails(bad, "version 1", "expected")
    bad.write_bytes(whole[:-100])
    fails(bad, "truncated", "blk.1.ffn_norm.weight")
    for size in range(24, 600, 7):
        bad.write_bytes(whole[:size])
        fails(bad, "header is damaged or truncated")


def test_errors_of_the_contents(tmp_path):
    path = tmp_path / "m.gguf"
    tensors = converted(hf_llama())
    fails(write(path, tensors, "mamba"), "architecture 'mamba'", "known: ", "llama")
    fails(write(path, {**tensors, "blk.0.ssm_a": random(4)}), "'blk.0.ssm_a'", "'llama'")
    fails(write(path, tensors, drop=["block_count"]), "llama.block_count is missing")
    fails(write(path, tensors, extra={"split.count": 2}), "split")
    fails(write(path, tensors, extra={"attention.head_count_kv": [1, 2]}), "head_count_kv")
    fails(write(path, tensors, extra={"rope.dimension_count": 4}), "rope.dimension_count")
    fails(write(path, tensors, extra={"attention.sliding_window": 4}), "sliding_window")
    raw = np.zeros((VOCAB, 84), np.uint8)
    bad_type = {**tensors, "token_embd.weight": (raw, Kind.Q2_K)}
    fails(write(path, bad_type), "'token_embd.weight'", "Q2_K", "expected one of", "Q4_K")
    checkpoint = GGUFCheckpoint(write(path, tensors))
    with pytest.raises(InputError, match=r"no tensor for 'lm_head\.weight'"):
        checkpoint.read("lm_head.weight")


@pytest.mark.real
def test_smollm2_weights_are_those_of_transformers(smollm2_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    checkpoint = GGUFCheckpoint(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    state = model.state_dict()
    assert set(state) - set(checkpoint.names) == {"lm_head.weight"}
    for name in checkpoint.names:
        np.testing.assert_array_equal(checkpoint.read(name), state[name].numpy())
    assert checkpoint.hf_config["num_hidden_layers"] == model.config.num_hidden_layers
