"""Model files that are damaged at random: they open, or end in one line that says why."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proxy_jax.checkpoints.loading import check_tensors, model_config, open_checkpoint
from proxy_jax.checkpoints.names import tensors
from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint
from proxy_jax.errors import InputError
from proxy_jax.models.hf_config import config_from_hf, config_to_hf
from tests.checkpoints.test_gguf import converted, hf_llama
from tests.checkpoints.test_gguf_tokenizer import byte_level, sentencepiece
from tests.models.families import FAMILIES

fuzzed = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = st.integers(-3, 300) | st.integers() | st.sampled_from([2**31, 2**63, 10**18, 10**400])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FLIPS = st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4)
KEYS = (
    "rope_theta rope_scaling rope_parameters layer_types sliding_window no_rope_layers head_dim"
    " use_sliding_window sliding_window_pattern max_window_layers attention_bias mlp_bias dtype"
    " torch_dtype quantization_config text_config eos_token_id partial_rotary_factor num_labels"
    " query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping hidden_activation"
    " no_rope_layer_interval rope_local_base_freq architectures pretraining_tp"
).split()
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "yarn", "default", "factors", "dynamic"])},
    optional={
        key: SCALARS
        for key in (
            "factor original_max_position_embeddings low_freq_factor high_freq_factor beta_fast"
            " beta_slow truncate attention_factor mscale mscale_all_dim rope_theta"
        ).split()
    }
    | {"factors": st.lists(st.floats(), max_size=8)},
)


def opens_or_says_why(action: Callable[[], object]) -> None:
    reason = "opened"
    try:
        action()
    except InputError as error:
        reason = str(error)
    assert len(reason.splitlines()) == 1


def read_all(path: Path) -> None:
    """What programs do with a model before its weights are on the devices."""
    checkpoint = open_checkpoint(str(path))
    config = model_config(checkpoint)
    assert all(end >= 0 for end in checkpoint.eos_ids)
    if path.is_file():
        checkpoint.tokenizer()
    check_tensors(checkpoint, tensors(config), tied=config.tied_head)
    for name in checkpoint.names[:3]:
        whole = (slice(None),) * len(checkpoint.shape(name))
        assert checkpoint.read(name, whole).shape == checkpoint.shape(name)


def flipped(content: bytes, flips: list[tuple[int, int]], head: int) -> bytes:
    damaged = bytearray(content)
    for place, byte in flips:
        damaged[place % head] = byte
    return bytes(damaged)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, build: Any) -> tuple[Path, bytes]:
    """A Hugging Face directory, and the bytes of its weights."""
    source, path = build("llama").path, tmp_path_factory.mktemp("fuzzed")
    for name in ("config.json", "model.safetensors"):
        (path / name).write_bytes((source / name).read_bytes())
    read_all(path)
    return path, (path / "model.safetensors").read_bytes()


@given(flips=FLIPS, kept=st.none() | st.integers(0, 3000))
@fuzzed
def test_bytes_of_a_safetensors_file(directory, flips, kept):
    path, content = directory
    head = 8 + int.from_bytes(content[:8], "little")
    (path / "model.safetensors").write_bytes(flipped(content, flips, head)[:kept])
    opens_or_says_why(lambda: read_all(path))


@given(data=st.data())
@fuzzed
def test_entries_of_a_safetensors_header(directory, data):
    path, content = directory
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    dtypes = st.sampled_from(["F8_E4M3", "F8_E8M0", "I32", "BOOL", "BF16", "F64", "F4"])
    sizes = st.lists(st.integers(0, 2**40), max_size=3)
    header[name] = {**header[name], field: data.draw(dtypes | sizes | JSON)}
    text = json.dumps(header).encode()
    damaged = struct.pack("<Q", len(text)) + text + content[end:]
    (path / "model.safetensors").write_bytes(damaged)
    opens_or_says_why(lambda: read_all(path))


@given(
    family=st.sampled_from(sorted({model_type for model_type, _ in FAMILIES.values()})),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON | ROPES, max_size=2),
    size=st.sampled_from(["", "num_hidden_layers", "hidden_size", "num_attention_heads"]),
    number=SCALARS,
)
@example("llama", {}, "num_hidden_layers", 10**7)
@fuzzed
def test_values_of_a_config(family, changes, size, number):
    hf = {"model_type": family, "num_hidden_layers": 2, "hidden_size": 48, "head_dim": 12}
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 76}
    hf |= changes | ({size: number} if size else {})

    def read() -> None:
        config = config_from_hf(hf)
        assert config_from_hf(config_to_hf(config)) == config

    opens_or_says_why(read)


@given(text=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@fuzzed
def test_files_of_json(directory, text):
    path, _ = directory
    other = path / "other"
    other.mkdir(exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        (other / name).write_bytes((path / "config.json").read_bytes())
    for name in ("model.safetensors.index.json", "generation_config.json", "config.json"):
        (other / name).write_bytes(text)

        def read() -> None:
            checkpoint = SafetensorsCheckpoint(other)
            _ = checkpoint.eos_ids, checkpoint.names

        opens_or_says_why(read)


def spelled(value: Any) -> bytes:
    """A metadata value with its type."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, max(-(2**63), min(value, 2**63 - 1)))
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + counted(value)
    if not value:
        return struct.pack("<IIQ", 9, 4, 0)
    entries = [spelled(entry) for entry in value]
    kind = entries[0][:4]
    same = [entry[4:] for entry in entries if entry[:4] == kind]
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(same)) + b"".join(same)


def counted(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def gguf_file(metadata: dict[str, Any], weights: dict[str, np.ndarray]) -> tuple[bytes, int]:
    """A file and the length of its header."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(weights), len(metadata))
    content += b"".join(counted(key) + spelled(value) for key, value in metadata.items())
    at = 0
    for name, weight in weights.items():
        dims = weight.shape[::-1]
        content += counted(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, at)
        at += -(-weight.nbytes // 32) * 32
    head = len(content)
    content += bytes(-head % 32)
    for weight in weights.values():
        content += weight.tobytes() + bytes(-weight.nbytes % 32)
    return content, head


def described(tokens: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the tiny model with a vocabulary."""
    sizes = {"block_count": 2, "embedding_length": 32, "feed_forward_length": 64}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "context_length": 128}
    fields = {"general.architecture": "llama", "general.alignment": 32}
    fields |= {f"llama.{key}": value for key, value in sizes.items()}
    fields |= {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4}
    return fields | {key: json.loads(json.dumps(value)) for key, value in tokens.items()}


VOCABULARIES = (described(byte_level("qwen2")), described(sentencepiece()))
MORE_KEYS = (
    "split.count llama.rope.scaling.type llama.rope.scaling.factor llama.attention.key_length"
    " llama.rope.scaling.original_context_length llama.rope.dimension_count"
    " llama.attention.sliding_window tokenizer.ggml.eot_token_id tokenizer.ggml.unknown_token_id"
    " tokenizer.ggml.add_bos_token tokenizer.ggml.add_space_prefix"
).split()


def weights() -> dict[str, np.ndarray]:
    return converted(hf_llama())


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzzed") / "m.gguf"
    for metadata in VOCABULARIES:
        path.write_bytes(gguf_file(metadata, weights())[0])
        read_all(path)
    return path


@given(metadata=st.sampled_from(VOCABULARIES), flips=FLIPS, kept=st.none() | st.integers(0, 9000))
@fuzzed
def test_bytes_of_a_gguf_file(gguf_path, metadata, flips, kept):
    content, head = gguf_file(metadata, weights())
    gguf_path.write_bytes(flipped(content, flips, head)[:kept])
    opens_or_says_why(lambda: read_all(gguf_path))


VALUES = SCALARS.filter(lambda value: value is not None)


@given(
    metadata=st.sampled_from(VOCABULARIES),
    key=st.sampled_from(sorted({*VOCABULARIES[0], *VOCABULARIES[1], *MORE_KEYS})),
    value=st.none() | VALUES | st.lists(VALUES, max_size=4),
    family=st.sampled_from(["llama", "gemma2", "gemma3", "smollm3"]),
)
@fuzzed
def test_metadata_of_a_gguf_file(gguf_path, metadata, key, value, family):
    changed = {k: v for k, v in metadata.items() if k != key}
    if value is not None:
        changed[key] = value
    if key != "general.architecture":
        changed["general.architecture"] = family
    named = {k.replace("llama.", f"{family}."): v for k, v in changed.items()}
    gguf_path.write_bytes(gguf_file(named, weights())[0])
    opens_or_says_why(lambda: read_all(gguf_path))
