"""ModelConfig: one frozen description that steers the Decoder for every model family."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from proxy_jax.models.activation import Activation


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
      theta: base wavelength.
      kind: how the frequencies are stretched to longer contexts. linear: Chen et al. 2023;
        llama3: the Llama 3.1 release; yarn: Peng et al. 2023; factors: one divisor a frequency,
        as GGUF files store the llama3 kind.
      factor: ratio of the stretched context to the original one.
      original_max_positions: context the model was pretrained with (llama3, yarn).
      low_freq_factor, high_freq_factor: llama3's band of interpolated wavelengths.
      beta_fast, beta_slow, truncate: yarn's band, in rotations over the original context.
      attention_factor: multiplies cos and sin (yarn).
      factors: [H / 2] divisors of the frequencies (factors).
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn", "factors"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each pair of dimensions, [H / 2] float32."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        plain = self.theta**-exponents
        if self.kind == "linear":
            plain = plain / self.factor
        elif self.kind == "factors":
            plain = plain / np.asarray(self.factors)
        elif self.kind == "llama3":
            plain = self._llama3(plain)
        elif self.kind == "yarn":
            plain = self._yarn(plain, head_dim)
        return plain.astype(np.float32)

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        # Rotations over the original context: few are stretched, many kept, between mixed.
        rotations = self.original_max_positions * plain / (2 * math.pi)
        band = self.high_freq_factor - self.low_freq_factor
        keep = np.clip((rotations - self.low_freq_factor) / band, 0.0, 1.0)
        return (1 - keep) * plain / self.factor + keep * plain

    def _yarn(self, plain: np.ndarray, head_dim: int) -> np.ndarray:
        def dimension(rotations: float) -> float:
            span = self.original_max_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(span) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
        stretch = np.clip(ramp, 0.0, 1.0)
        return stretch * plain / self.factor + (1 - stretch) * plain


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only transformer; hashable, so it can be static under jit.

    Attributes:
      family: the Hugging Face model_type the config came from.
      vocab_size, num_layers, model_dim, mlp_dim, num_heads, num_kv_heads, head_dim: V, L, D, F, N,
        K, H of the einsums.
      max_positions: context length the model supports.
      ropes: the kinds of rotary embedding the layers use; None is a layer without positions.
      layer_ropes: per layer, its index in `ropes`.
      layer_windows: per layer, how many positions back it sees (itself included); None is all.
      norms: where a block normalises: before each sublayer (pre), its output (post: OLMo 2), or
        both (sandwich: Gemma).
      norm_unit_offset: weights are stored as their difference from 1 (Gemma).
      qk_norm: RMSNorm of queries and keys: per head (Qwen3, Gemma 3), over the whole projection
        (OLMo 2), or none.
      activation: of the gate of the MLP.
      embedding_scale: multiplies the token embeddings (Gemma).
      query_scale: multiplies queries times keys; usually head_dim ** -0.5.
      attention_softcap, final_softcap: c in c * tanh(x / c), on scores and logits (Gemma 2).
    """

    family: str
    vocab_size: int
    num_layers: int
    model_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    ropes: tuple[Rope | None, ...]
    layer_ropes: tuple[int, ...]
    layer_windows: tuple[int | None, ...]
    query_scale: float
    norms: Literal["pre", "post", "sandwich"] = "pre"
    norm_unit_offset: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    activation: Activation = "silu"
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each dimension by its einsum letter."""
        return {
            "V": self.vocab_size,
            "D": self.model_dim,
            "F": self.mlp_dim,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
        }

    def of_one_layer(self) -> ModelConfig:
        """The same architecture with its first layer alone; all layers have the same parameters."""
        return dataclasses.replace(
            self,
            num_layers=1,
            layer_ropes=self.layer_ropes[:1],
            layer_windows=self.layer_windows[:1],
        )
