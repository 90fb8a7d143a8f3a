"""Constraints on the combined logits, applied before temperature.

Letters: B batch rows, V vocabulary, W tokens of context that banned sequences look back on, A
automata of banned strings (decode.bans), N states of one.
They see M's context (its prompt and what was generated), as in the published implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode.bans import BANNED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Processors:
    """What may not be generated; None leaves a constraint out of the compiled program.

    Attributes:
      banned_strings: A tables [N, V] int32, the state after a token, or decode.bans.BANNED.
      banned_tokens: prefixes [n, W] int32 (-1 matches anything) and last tokens [n]: a last token
        is banned where its prefix has just been generated.
      banned_first_tokens: [m] ids that may not be the first new token.
      min_new_tokens: scalar; no EOS before.
      repetition_penalty: scalar r; logits of tokens already in the context are divided by r where
        positive and multiplied where negative (Keskar et al. 2019).
      eos: [e] ids that end a text.
    """

    banned_strings: tuple[jax.Array, ...]
    banned_tokens: tuple[jax.Array, jax.Array] | None
    banned_first_tokens: jax.Array | None
    min_new_tokens: jax.Array | None
    repetition_penalty: jax.Array | None
    eos: jax.Array

    @property
    def look_back(self) -> int:
        """W, how many tokens of context `process` needs."""
        return 0 if self.banned_tokens is None else self.banned_tokens[0].shape[1]


def make_processors(
    eos: Sequence[int],
    banned_strings: Sequence[jax.Array] = (),
    banned_tokens: Sequence[Sequence[int]] = (),
    banned_first_tokens: Sequence[int] = (),
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
) -> Processors:
    """Builds the constraints; values that change nothing are left out."""
    fields: dict[str, Any] = {"banned_tokens": None, "banned_first_tokens": None}
    if banned_tokens:
        width = max(len(sequence) for sequence in banned_tokens) - 1
        prefixes = [[-1] * (width + 1 - len(s)) + list(s[:-1]) for s in banned_tokens]
        fields["banned_tokens"] = (
            np.asarray(prefixes, np.int32).reshape(len(banned_tokens), width),
            np.asarray([s[-1] for s in banned_tokens], np.int32),
        )
    if banned_first_tokens:
        fields["banned_first_tokens"] = np.asarray(banned_first_tokens, np.int32)
    penalised = repetition_penalty != 1.0
    return Processors(
        **fields,
        banned_strings=tuple(banned_strings),
        min_new_tokens=jnp.int32(min_new_tokens) if min_new_tokens > 0 else None,
        repetition_penalty=jnp.float32(repetition_penalty) if penalised else None,
        eos=jnp.asarray(eos, jnp.int32),
    )


def process(
    logits: jax.Array,
    processors: Processors,
    ban_states: jax.Array,
    recent: jax.Array,
    seen: jax.Array | None,
    generated: jax.Array,
) -> jax.Array:
    """Applies the constraints.

    Args:
      logits: [B, V] float32.
      ban_states: [B, A] state of each automaton after M's context.
      recent: [B, W] the last tokens of M's context, oldest first; -2 where there is none.
      seen: [B, V] bool, tokens in M's context; None without a repetition penalty.
      generated: [B] new tokens so far.

    Returns:
      [B, V] float32, -inf where banned.
    """
    if processors.repetition_penalty is not None and seen is not None:
        penalty = processors.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    for automaton, table in enumerate(processors.banned_strings):
        logits = jnp.where(table[ban_states[:, automaton]] == BANNED, -jnp.inf, logits)
    if processors.banned_tokens is not None:
        prefix, last = processors.banned_tokens
        matches = (prefix[None] == recent[:, None]) | (prefix[None] == -1)
        logits = _ban(logits, last, jnp.all(matches, axis=-1))
    if processors.banned_first_tokens is not None:
        logits = _ban(logits, processors.banned_first_tokens, (generated == 0)[:, None])
    if processors.min_new_tokens is not None:
        early = (generated < processors.min_new_tokens)[:, None]
        logits = _ban(logits, processors.eos, early)
    return logits


def advance(processors: Processors, ban_states: jax.Array, token: jax.Array) -> jax.Array:
    """Moves the automata on by a token [B]; ban_states and what comes out are [B, A]."""
    for automaton, table in enumerate(processors.banned_strings):
        after = table[ban_states[:, automaton], token]
        ban_states = ban_states.at[:, automaton].set(after)
    return ban_states


def _ban(logits: jax.Array, ids: jax.Array, where: jax.Array) -> jax.Array:
    """-inf at ids[n] in the rows where where[b, n] (or [b, 1]) holds."""
    ceiling = jnp.where(jnp.broadcast_to(where, (logits.shape[0], len(ids))), -jnp.inf, jnp.inf)
    return logits.at[:, ids].min(ceiling)
