"""GGUF files presented as Hugging Face checkpoints: HF tensor names and layouts, config, tokenizer.

The header is parsed here and not by ``gguf.GGUFReader``: that builds one array object per string,
which takes 7 s and 700 MB for a vocabulary of 150,000 tokens. Type sizes and dequantisation are
the ``gguf`` package's. What the converters change on the way from a Hugging Face checkpoint (and
what is undone here) is defined in llama.cpp's ``conversion/{llama,gemma,olmo,smollm}.py``; defaults
of missing keys are those of its ``src/models/*.cpp``.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from proxy_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SUPPORTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# Rows dequantised at a time: bounds the temporaries, of which gguf makes several.
_CHUNK_ROWS = 2048
# struct codes of GGUFValueType 0-7 and 10-12; the two between are strings and arrays.
_SCALAR_CODES = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SANDWICH_NORMS = {
    **_POST_NORMS,
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}
_YARN_KEYS = {
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class _Architecture:
    model_type: str
    hf_class: str
    norms: Mapping[str, str]
    # Rows of q and k are stored in the order that RoPE on neighbouring pairs needs.
    interleaved: bool = False
    # What the converter added to every norm weight.
    norm_offset: float = 0.0
    hidden_act: str = "silu"


_GEMMA: Any = {"norm_offset": 1.0, "hidden_act": "gelu_pytorch_tanh"}
_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", _PRE_NORMS, interleaved=True),
    "smollm3": _Architecture("smollm3", "SmolLM3ForCausalLM", _PRE_NORMS, interleaved=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", _PRE_NORMS),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", _PRE_NORMS | _QK_NORMS),
    "gemma2": _Architecture("gemma2", "Gemma2ForCausalLM", _SANDWICH_NORMS, **_GEMMA),
    "gemma3": _Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _SANDWICH_NORMS | _QK_NORMS, **_GEMMA
    ),
    "olmo2": _Architecture("olmo2", "Olmo2ForCausalLM", _POST_NORMS | _QK_NORMS),
}


class Metadata(dict[str, Any]):
    """Metadata of one GGUF file; ``metadata[key]`` raises InputError when the key is missing."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.path}: metadata key {key!r} is missing")


@dataclass(frozen=True)
class _Tensor:
    gguf_name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    nbytes: int


class _Cursor:
    """Reads the little-endian values of a header one after the other."""

    def __init__(self, data: np.ndarray, at: int):
        self.data = data.data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size = self.number("Q")
        raw = self.data[self.at : self.at + size]
        if len(raw) < size:
            raise ValueError("string beyond the end of the file")
        self.at += size
        return str(raw, "utf-8")

    def value(self) -> Any:
        kind = GGUFValueType(self.number("I"))
        if kind == GGUFValueType.ARRAY:
            return self._array()
        if kind == GGUFValueType.STRING:
            return self.text()
        value = self.number(_SCALAR_CODES[kind])
        if kind == GGUFValueType.FLOAT32:
            # The shortest decimal with this float32 value: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(value)))
        return value

    def _array(self) -> list[Any]:
        kind = GGUFValueType(self.number("I"))
        count = self.number("Q")
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        dtype = np.dtype("<" + _SCALAR_CODES[kind])
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values.tolist()


class GGUFCheckpoint:
    """A GGUF file seen as a Hugging Face checkpoint. The weights stay on disk until they are read.

    Attributes:
      path: the file.
      names: Hugging Face names of the tensors, in file order.
      hf_config: what config.json would hold, with the keys of transformers 4.

    Raises:
      InputError: not a whole GGUF file, or something in it that cannot be presented faithfully.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable GGUF file ({error})") from error
        self._metadata, infos = self._parse_header()
        arch = self._metadata["general.architecture"]
        if arch not in _ARCHITECTURES:
            raise InputError(
                f"{path}: architecture {arch!r} is not supported,"
                f" expected one of {', '.join(sorted(_ARCHITECTURES))}"
            )
        if self._metadata.get("split.count", 1) > 1:
            raise InputError(f"{path}: is one part of a split model, expected a single merged file")
        self._arch_key = arch
        self._arch = _ARCHITECTURES[arch]
        rope = [tensor for tensor in infos if tensor.gguf_name == _ROPE_FACTORS]
        self._rope_factors = rope[0] if rope else None
        self._tensors = {
            self._hf_name(tensor.gguf_name): tensor
            for tensor in infos
            if tensor.gguf_name != _ROPE_FACTORS
        }
        self.names = tuple(self._tensors)
        self.hf_config = self._make_config()
        self._heads = {
            "q_proj": self.hf_config["num_attention_heads"],
            "k_proj": self.hf_config["num_key_value_heads"],
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the Hugging Face layout, [out, in] for linears."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """Storage type in the file, for example "Q4_K" or "F32"."""
        return self._tensor(name).kind.name

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor or a part of it as float32, in the Hugging Face layout.

        Only the rows that index[0] selects are read from disk and dequantised; the slices for the
        other axes are applied afterwards.

        Raises:
          InputError: no tensor of that name.
        """
        tensor = self._tensor(name)
        first, *rest = index or (slice(None),)
        rows = self._source_rows(name, tensor)
        selected: Any = first if rows is None else rows[first]
        if len(tensor.shape) == 1:
            values = self._dequantise(tensor, slice(None))[0][selected]
        else:
            values = self._dequantise(tensor, selected)
        if self._arch.norm_offset and name.endswith("norm.weight"):
            values = values - np.float32(self._arch.norm_offset)
        return values[(slice(None), *rest)]

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer that the metadata describe; see ``gguf_tokenizer``."""
        from proxy_jax.checkpoints.gguf_tokenizer import make_tokenizer  # imports transformers

        return make_tokenizer(self._metadata)

    def _parse_header(self) -> tuple[Metadata, list[_Tensor]]:
        if bytes(self._data[:4]) != b"GGUF" or self._data.size < 24:
            raise InputError(f"{self.path}: not a GGUF file (it does not start like one)")
        version, tensor_count, key_count = struct.unpack_from("<IQQ", self._data.data, 4)
        if version not in _VERSIONS:
            raise InputError(
                f"{self.path}: GGUF version {version}, expected a little-endian file of version"
                f" {' or '.join(map(str, _VERSIONS))}"
            )
        cursor = _Cursor(self._data, 24)
        metadata = Metadata(self.path)
        raw_infos = []
        try:
            for _ in range(key_count):
                key = cursor.text()
                metadata[key] = cursor.value()
            for _ in range(tensor_count):
                name = cursor.text()
                # ggml lists the fastest dimension first, Hugging Face last.
                dims = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
                raw_infos.append((name, dims, cursor.number("I"), cursor.number("Q")))
        except (struct.error, ValueError, KeyError, OverflowError) as error:
            raise InputError(
                f"{self.path}: the header is damaged or truncated near byte {cursor.at} ({error})"
            ) from error
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        data_start = -(-cursor.at // alignment) * alignment
        return metadata, [
            self._checked_tensor(name, dims, kind, data_start + offset)
            for name, dims, kind, offset in raw_infos
        ]

    def _checked_tensor(
        self, name: str, shape: tuple[int, ...], kind_number: int, start: int
    ) -> _Tensor:
        kind = {kind.value: kind for kind in GGMLQuantizationType}.get(kind_number)
        if kind is None or kind.name not in _SUPPORTED:
            raise InputError(
                f"{self.path}: tensor {name!r} has type {kind.name if kind else kind_number},"
                f" expected one of {', '.join(_SUPPORTED)}"
            )
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise InputError(
                f"{self.path}: tensor {name!r} has rows of {shape[-1]} values,"
                f" expected a multiple of {block} for type {kind.name}"
            )
        nbytes = int(np.prod(shape, dtype=object)) // block * block_bytes
        if start + nbytes > self._data.size:
            raise InputError(
                f"{self.path}: truncated file: tensor {name!r} ends at byte {start + nbytes},"
                f" but the file has {self._data.size} bytes"
            )
        return _Tensor(name, shape, kind, start, nbytes)

    def _hf_name(self, gguf_name: str) -> str:
        if gguf_name in _TOP_NAMES:
            return _TOP_NAMES[gguf_name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
        module = match and (_LINEARS | dict(self._arch.norms)).get(match[2])
        if not match or not module:
            raise InputError(
                f"{self.path}: tensor {gguf_name!r} is not part of architecture {self._arch_key!r}"
                " as this library knows it"
            )
        return f"model.layers.{match[1]}.{module}.{match[3]}"

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise InputError(f"{self.path}: there is no tensor for {name!r}")
        return self._tensors[name]

    def _source_rows(self, name: str, tensor: _Tensor) -> np.ndarray | None:
        """Row in the file for every Hugging Face row; None where the order is the same."""
        module = name.split(".")[-2]
        if not self._arch.interleaved or module not in self._heads:
            return None
        rows = np.arange(tensor.shape[0])
        return rows.reshape(self._heads[module], -1, 2).swapaxes(1, 2).ravel()

    def _dequantise(self, tensor: _Tensor, rows: slice | np.ndarray) -> np.ndarray:
        """Rows of a tensor as float32 [rows, columns]; a vector is one row."""
        raw = self._data[tensor.start : tensor.start + tensor.nbytes].view(np.ndarray)
        columns = tensor.shape[-1]
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        table = raw.reshape(-1, columns // block * block_bytes)[rows]
        values = np.empty((len(table), columns), np.float32)
        for start in range(0, len(table), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            values[part] = dequantize(table[part], tensor.kind)
        return values

    def _make_config(self) -> dict[str, Any]:
        meta, arch, prefix = self._metadata, self._arch, self._arch_key
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
            if isinstance(meta.get(f"{prefix}.{key}"), list):
                raise InputError(
                    f"{self.path}: metadata key {prefix}.{key} differs between layers,"
                    " expected a single number"
                )
        layers = meta[f"{prefix}.block_count"]
        hidden = meta[f"{prefix}.embedding_length"]
        heads = meta[f"{prefix}.attention.head_count"]
        head_dim = meta.get(f"{prefix}.attention.key_length", hidden // heads)
        if meta.get(f"{prefix}.rope.dimension_count", head_dim) != head_dim:
            raise InputError(
                f"{self.path}: metadata key {prefix}.rope.dimension_count is not the head size"
                f" {head_dim}; partial rotary embeddings are not supported"
            )
        config: dict[str, Any] = {
            "model_type": arch.model_type,
            "architectures": [arch.hf_class],
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": meta[f"{prefix}.feed_forward_length"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get(f"{prefix}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": arch.hidden_act,
            "rms_norm_eps": meta[f"{prefix}.attention.layer_norm_rms_epsilon"],
            "max_position_embeddings": meta[f"{prefix}.context_length"],
            "rope_theta": meta.get(f"{prefix}.rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            # As in config.json: biases on all four projections (Qwen2's three need no key).
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._tensors,
        }
        for role in ("bos_token_id", "eos_token_id"):
            if (token_id := meta.get(f"tokenizer.ggml.{role}")) is not None:
                config[role] = token_id
        if prefix == "smollm3":
            config["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(layers)]
        if prefix in ("gemma2", "gemma3"):
            config.update(self._gemma_config(layers, hidden, heads, head_dim))
        elif f"{prefix}.attention.sliding_window" in meta:
            raise InputError(
                f"{self.path}: metadata key {prefix}.attention.sliding_window is not supported"
                f" for architecture {prefix!r}"
            )
        return config

    def _gemma_config(self, layers: int, hidden: int, heads: int, head_dim: int) -> dict[str, Any]:
        meta, prefix = self._metadata, self._arch_key
        gemma2 = prefix == "gemma2"
        # Gemma 3 without a window has full attention everywhere; Gemma 2 always has one.
        window = meta.get(f"{prefix}.attention.sliding_window", 4096 if gemma2 else None)
        pattern = meta.get(f"{prefix}.attention.sliding_window_pattern", 2 if gemma2 else 6)
        if isinstance(pattern, int):
            pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
        sliding = [bool(window) and bool(flag) for flag in pattern]
        # The largest model of either family (and no other) scales by hidden size per head.
        largest = layers == (46 if gemma2 else 62)
        config = {
            "hidden_activation": self._arch.hidden_act,
            "sliding_window": window,
            "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
            "query_pre_attn_scalar": hidden // heads if largest else head_dim,
            "attn_logit_softcapping": meta.get(
                f"{prefix}.attn_logit_softcapping", 50.0 if gemma2 else None
            ),
            "final_logit_softcapping": meta.get(
                f"{prefix}.final_logit_softcapping", 30.0 if gemma2 else None
            ),
        }
        if not gemma2:
            config["rope_local_base_freq"] = meta.get(f"{prefix}.rope.freq_base_swa", 10000.0)
        return config

    def _rope_scaling(self) -> dict[str, Any] | None:
        meta, prefix = self._metadata, f"{self._arch_key}.rope.scaling"
        if self._rope_factors is not None:
            # Llama 3 scaling, already worked out by the converter: one divisor per frequency.
            factors = self._dequantise(self._rope_factors, slice(None))[0]
            return {"rope_type": "factors", "factors": [float(factor) for factor in factors]}
        factor = meta.get(f"{prefix}.factor")
        kind = meta.get(f"{prefix}.type", "linear" if factor else "none")
        if kind == "none":
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": meta[f"{prefix}.factor"]}
        if kind != "yarn":
            raise InputError(
                f"{self.path}: metadata key {prefix}.type is {kind!r},"
                " expected none, linear or yarn"
            )
        scaling = {
            "rope_type": "yarn",
            "factor": meta[f"{prefix}.factor"],
            "original_max_position_embeddings": meta[f"{prefix}.original_context_length"],
        }
        for gguf_key, hf_key in _YARN_KEYS.items():
            if (value := meta.get(f"{prefix}.{gguf_key}")) is not None:
                scaling[hf_key] = value
        return scaling
