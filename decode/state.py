"""What the compiled loop carries from step to step.

Letters: B slots (rows of the batch), R roles present, P pieces of an alpha schedule, W look-back
of banned sequences, A automata of banned strings, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax

from proxy_jax.models.cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """One request a slot; every array has the slots as its first axis.

    The caches hold everything of a row's context but its last token, which the next step feeds.

    Attributes:
      active: [B] bool, whether the slot is decoding; an idle slot computes but changes nothing.
      row: [B] uint32, identity of the request, the source of its randomness.
      last: [B, R] int32, last token of each role's context. Roles differ here only until the
        first token is drawn: their prompts may end differently.
      generated: [B] int32, new tokens so far.
      limit: [B] int32, most new tokens.
      alpha_starts, alpha_values: [B, P], the coefficient is that of the last start <= generated.
      ban_states: [B, A] int32, state of each automaton (decode.bans) after M's context.
      recent: [B, W] int32, the last tokens of M's context.
      seen: [B, V] bool, tokens of M's context; None without a repetition penalty.
      broken: [B, R + 1] bool, whether a model's logits were ever not finite; last, whether ever
        the combined ones left nothing to draw.
    """

    active: jax.Array
    row: jax.Array
    last: jax.Array
    generated: jax.Array
    limit: jax.Array
    alpha_starts: jax.Array
    alpha_values: jax.Array
    ban_states: jax.Array
    recent: jax.Array
    seen: jax.Array | None
    broken: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The running batch.

    Attributes:
      caches: one KVCache a pass; that of two roles has an axis of 2 for them, after the layers' if
        these are stacked.
      rows: the slots.
    """

    caches: tuple[KVCache, ...]
    rows: Rows
