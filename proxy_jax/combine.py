"""The logit arithmetic of proxy-tuning and its relatives.

Letters: B batch rows, V vocabulary of the base model. All of it in float32.

Every method of the family adds weighted differences of logits to the base model's:

    s = s_M + sum_i c_i (s_i+ - s_i-)

proxy-tuning (Liu et al. 2024), DExperts (Liu et al. 2021) and EFT's up-scaling (Mitchell et al.
2023) have one difference, expert minus anti-expert, with c = alpha. The scale form
s_- + alpha (s_+ - s_-) + beta (s_M - s_-) is the same with a second one, base minus anti-expert,
with c = beta - 1: contrastive decoding, amplified up-scaling, DeRa. The coefficients are traced
arrays, so a new value never recompiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Offset = tuple[jax.Array, jax.Array, jax.Array]


def combine(base: jax.Array, offsets: Sequence[Offset], shared: jax.Array) -> jax.Array:
    """Shifts the base model's logits by weighted differences of other models' logits.

    A coefficient of 0, or two equal arrays, leaves `base` as it is, bit for bit.

    Args:
      base: [B, V] float32.
      offsets: (plus, minus, coefficient): two arrays [B, V'] float32 and one [B]. V' may differ
        from V: ids beyond it get no offset, ids beyond V are cut off.
      shared: [V] bool, the ids that mean the same in all models; the others keep base's logits.

    Returns:
      [B, V] float32.
    """
    total = base
    for plus, minus, coefficient in offsets:
        difference = fit(plus, base.shape[-1]) - fit(minus, base.shape[-1])
        total = total + jnp.where(shared, coefficient[:, None] * difference, 0.0)
    return total


def fit(logits: jax.Array, size: int) -> jax.Array:
    """Cuts or zero-pads the last axis to `size`: vocabularies may end in different padding."""
    missing = size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :size]
    return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)])
