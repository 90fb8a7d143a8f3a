"""How much arithmetic a training step is, and how much of it the devices could do."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import abstract_params

# Dense bfloat16 products a second of one device, as its maker states it.
_BFLOAT16_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
_MEASURED_SIZE = 2048  # of the square product that is timed on other devices


def step_flops(model: ModelConfig, metrics: Mapping[str, float], *, lora: bool) -> float:
    """Floating-point operations of an update, without what is computed twice to save memory.

    A product with a weight of n parameters is 2n operations a token forward, as many for the
    gradient of its input, and as many for that of the weight, which LoRA has none of (its own
    matrices are too small to count). The head is needed for trained tokens only. Attention is
    4 N H operations a pair of tokens and layer, and always three times that (the accounting of
    PaLM, Chowdhery et al. 2022, appendix B, with pairs that exist in place of all).

    Args:
      model: the architecture.
      metrics: of train_step: "tokens", "trained_tokens" and "pairs".
      lora: only an adapter is trained.
    """
    products, attention = forward_flops(model, metrics)
    return (2 if lora else 3) * products + 3 * attention


def forward_flops(model: ModelConfig, metrics: Mapping[str, float]) -> tuple[float, float]:
    """Floating-point operations of one forward pass: products with weights, and attention.

    Args:
      model, metrics: as in `step_flops`.
    """
    layers = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(model)["layers"]))
    head = model.vocab_size * model.model_dim
    products = 2 * (layers * metrics["tokens"] + head * metrics["trained_tokens"])
    attention = 4 * model.num_heads * model.head_dim * model.num_layers * metrics["pairs"]
    return products, attention


def peak_flops(dtype: Any) -> float:
    """Floating-point operations a second of all devices together, at best.

    The maker's figure for bfloat16 on a known TPU or GPU; elsewhere a large product is timed.
    """
    kind = jax.devices()[0].device_kind
    known = [name for name in _BFLOAT16_PEAK if kind.startswith(name)]
    if jnp.dtype(dtype) == jnp.bfloat16 and known:
        return _BFLOAT16_PEAK[max(known, key=len)] * jax.device_count()
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return product_flops(dtype, _MEASURED_SIZE) * devices


def product_flops(dtype: Any, size: int) -> float:
    """Times a square product: floating-point operations a second of one device, the best of three.

    Args:
      dtype: of both factors; the result is float32.
      size: n of [n, n].
    """
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(
        lambda a, b: jnp.matmul(
            a, b, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
        )
    )
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
