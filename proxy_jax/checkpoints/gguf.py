"""GGUF files presented as Hugging Face checkpoints: HF tensor names and layouts, config, tokenizer.

Dequantisation is the ``gguf`` package's. What the converters change on the way from a Hugging Face
checkpoint (and what is undone here) is defined in llama.cpp's
``conversion/{llama,gemma,olmo,smollm}.py``; defaults of missing keys are those of its
``src/models/*.cpp``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, TokenType
from gguf.quants import dequantize

from proxy_jax.checkpoints.gguf_header import StoredTensor, read_header
from proxy_jax.errors import InputError
from proxy_jax.models.hf_config import LARGEST
from proxy_jax.reading import reading, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Rows dequantised at a time: bounds the temporaries, of which gguf makes several.
_CHUNK_ROWS = 2048

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
# What ends a text for llama.cpp (src/llama-vocab.cpp): ids that keys name, and tokens that read so.
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_END_TEXTS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <end_of_turn>"
    " <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance>"
    " <eos> <turn|> <|tool_response> <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|>"
    " <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|> <fim-sep> <fim_sep>".split()
)
# In vocabularies with tokens of both kinds, <|end|> ends a message, and the text goes on.
_END_OF_MESSAGE = "<|end|>"
_AFTER_MESSAGES = ({"<|return|>", "<|flush|>"}, {"<|call|>", "<|calls|>"})
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
        with reading(path, "not a readable GGUF file"):
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
        self._metadata, infos = read_header(path, self._data)
        arch = self._metadata.choice("general.architecture", sorted(_ARCHITECTURES))
        if self._metadata.integer("split.count", default=1) > 1:
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

    @property
    def at_hand(self) -> bool:
        """Whether the weights are on disk."""
        return True

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text or a turn: those the metadata name, and control tokens known to."""
        tokens = self._metadata.array("tokenizer.ggml.tokens", str, default=())
        types = self._metadata.array("tokenizer.ggml.token_type", int, default=())
        texts = {
            token: index
            for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
            if kind == TokenType.CONTROL and token in _END_TEXTS
        }
        if all(kinds & texts.keys() for kinds in _AFTER_MESSAGES):
            texts.pop(_END_OF_MESSAGE, None)
        return tuple(sorted({*texts.values(), *self._named_ids(_END_KEYS).values()}))

    def _named_ids(self, roles: Iterable[str]) -> dict[str, int]:
        """Ids of special tokens, by the role that a metadata key gives them."""
        tokens = self._metadata.array("tokenizer.ggml.tokens", str, default=())
        count = len(tokens) or self.shape("model.embed_tokens.weight")[0]
        ids = {
            role: self._metadata.integer(
                f"tokenizer.ggml.{role}_token_id", 0, count - 1, default=None
            )
            for role in roles
        }
        return {role: token_id for role, token_id in ids.items() if token_id is not None}

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer that the metadata describe; see ``gguf_tokenizer``."""
        from proxy_jax.checkpoints.gguf_tokenizer import make_tokenizer  # imports transformers

        with reading(self.path, "no readable tokenizer"):
            return make_tokenizer(self._metadata)

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

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise InputError(f"{self.path}: there is no tensor for {name!r}")
        return self._tensors[name]

    def _source_rows(self, name: str, tensor: StoredTensor) -> np.ndarray | None:
        """Row in the file for every Hugging Face row; None where the order is the same."""
        module = name.split(".")[-2]
        if not self._arch.interleaved or module not in self._heads:
            return None
        rows = np.arange(tensor.shape[0])
        return rows.reshape(self._heads[module], -1, 2).swapaxes(1, 2).ravel()

    def _dequantise(self, tensor: StoredTensor, rows: slice | np.ndarray) -> np.ndarray:
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
        layers = meta.integer(f"{prefix}.block_count", 1, LARGEST["num_hidden_layers"])
        hidden = meta.integer(f"{prefix}.embedding_length", 1)
        heads = meta.integer(f"{prefix}.attention.head_count", 1)
        head_dim = meta.integer(f"{prefix}.attention.key_length", 1, default=hidden // heads)
        if meta.integer(f"{prefix}.rope.dimension_count", default=head_dim) != head_dim:
            raise InputError(
                f"{self.path}: metadata key {prefix}.rope.dimension_count is not the head size"
                f" {head_dim}; partial rotary embeddings are not supported"
            )
        config: dict[str, Any] = {
            "model_type": arch.model_type,
            "architectures": [arch.hf_class],
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": meta.integer(f"{prefix}.feed_forward_length", 1),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": meta.integer(
                f"{prefix}.attention.head_count_kv", 1, default=heads
            ),
            "head_dim": head_dim,
            "hidden_act": arch.hidden_act,
            "rms_norm_eps": meta.real(f"{prefix}.attention.layer_norm_rms_epsilon", above=0),
            "max_position_embeddings": meta.integer(f"{prefix}.context_length", 1),
            "rope_theta": meta.real(f"{prefix}.rope.freq_base", above=0, default=10000.0),
            "rope_scaling": self._rope_scaling(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            # As in config.json: biases on all four projections (Qwen2's three need no key).
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._tensors,
        }
        for role, token_id in self._named_ids(("bos", "eos")).items():
            config[f"{role}_token_id"] = token_id
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
        window = meta.integer(
            f"{prefix}.attention.sliding_window", 0, default=4096 if gemma2 else None
        )
        sliding = [bool(window) and slides for slides in self._sliding(layers, 2 if gemma2 else 6)]
        # The largest model of either family (and no other) scales by hidden size per head.
        largest = layers == (46 if gemma2 else 62)
        config = {
            "hidden_activation": self._arch.hidden_act,
            "sliding_window": window or None,
            "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
            "query_pre_attn_scalar": hidden // heads if largest else head_dim,
            "attn_logit_softcapping": meta.real(
                f"{prefix}.attn_logit_softcapping", above=0, default=50.0 if gemma2 else None
            ),
            "final_logit_softcapping": meta.real(
                f"{prefix}.final_logit_softcapping", above=0, default=30.0 if gemma2 else None
            ),
        }
        if not gemma2:
            config["rope_local_base_freq"] = meta.real(
                f"{prefix}.rope.freq_base_swa", above=0, default=10000.0
            )
        return config

    def _sliding(self, layers: int, default: int) -> list[bool]:
        """Whether each layer has a window: all but every so many, or as a list says."""
        key = f"{self._arch_key}.attention.sliding_window_pattern"
        pattern = self._metadata.get(key)
        if not isinstance(pattern, list):
            period = self._metadata.integer(key, 1, default=default)
            return [(layer + 1) % period != 0 for layer in range(layers)]
        if len(pattern) != layers or not all(slides in (0, 1) for slides in pattern):
            raise InputError(
                f"{self.path}: metadata key {key} is {shown(pattern)}, expected 0 or 1 for each of"
                f" {layers} layers"
            )
        return [bool(slides) for slides in pattern]

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        meta, prefix = self._metadata, f"{self._arch_key}.rope.scaling"
        if self._rope_factors is not None:
            # Llama 3 scaling, already worked out by the converter: one divisor per frequency.
            if self._rope_factors.shape != (head_dim // 2,):
                raise InputError(
                    f"{self.path}: tensor {_ROPE_FACTORS!r} has shape {self._rope_factors.shape},"
                    f" expected ({head_dim // 2},): half the head size"
                )
            factors = self._dequantise(self._rope_factors, slice(None))[0]
            return {"rope_type": "factors", "factors": [float(factor) for factor in factors]}
        factor = meta.real(f"{prefix}.factor", 0, default=None)
        kind = meta.choice(
            f"{prefix}.type", ("none", "linear", "yarn"), default="linear" if factor else "none"
        )
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": meta.real(f"{prefix}.factor", above=0)}
        if kind == "linear":
            return scaling
        original = meta.integer(f"{prefix}.original_context_length", 1)
        scaling["original_max_position_embeddings"] = original
        for gguf_key, hf_key in _YARN_KEYS.items():
            if (value := meta.real(f"{prefix}.{gguf_key}", default=None)) is not None:
                scaling[hf_key] = value
        return scaling
