"""From logits to a token: temperature, truncation, and the draw.

Letters: B batch rows, V vocabulary. A setting that is None is left out of the compiled program;
the others are traced, so that a new value does not recompile. `checked` is the one place that says
which values there may be and which of them change nothing; whoever takes a Sampling or a Truncation
from a user calls it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxy_jax.errors import InputError
from proxy_jax.reading import Fields, shown

Scalar = jax.Array | float | None
INT32 = 2**31 - 1  # the largest one
# Logits are divided by temperatures and repetition penalties, and stay within float32 so.
SMALLEST_DIVISOR, LARGEST_DIVISOR = 1e-30, 1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truncation:
    """Which tokens stay in play; several settings apply one after the other, in this order.

    Attributes:
      top_k: the k most likely tokens.
      top_p: the fewest tokens whose probabilities reach p; the one that crosses p is kept.
      min_p: tokens at least this share as likely as the most likely one.
    """

    top_k: Scalar = None
    top_p: Scalar = None
    min_p: Scalar = None

    def checked(self, where: str) -> Truncation:
        """Checks the values, and leaves out those that change nothing.

        They are the conventions of vLLM and of transformers: top_k of 0 or -1, top_p of 1 and
        min_p of 0 are no truncation. A top_p of 0, on which the two differ, is refused.

        Args:
          where: what errors call it, "sampling".

        Raises:
          InputError: a value that is no number, or out of range.
        """
        fields = _fields(self, where)
        top_k = fields.integer("top_k", -1, INT32, default=None)
        top_p = fields.real("top_p", 0, 1, above=0, default=None)
        return Truncation(
            top_k=None if top_k in (0, -1) else top_k,
            top_p=None if top_p == 1 else top_p,
            min_p=fields.real("min_p", 0, 1, default=None) or None,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature None is greedy: the highest logit, lowest id on ties."""

    temperature: Scalar = None
    truncation: Truncation = Truncation()

    def checked(self) -> Sampling:
        """Checks the values, and leaves out those that change nothing; temperature 0 is greedy.

        Raises:
          InputError: a value that is no number, or out of range.
        """
        temperature = _fields(self, "sampling").real("temperature", 0, default=None) or None
        if temperature and not SMALLEST_DIVISOR <= temperature <= LARGEST_DIVISOR:
            raise InputError(
                f"sampling: temperature must be 0 or between {SMALLEST_DIVISOR:g} and "
                f"{LARGEST_DIVISOR:g}, not {temperature:g}"
            )
        if not isinstance(self.truncation, Truncation):
            raise InputError(f"sampling: not a Truncation: {shown(self.truncation)}")
        return Sampling(temperature, self.truncation.checked("sampling"))


def as_python(value: Any) -> Any:
    """Converts numbers and arrays of numpy and JAX to Python's numbers and lists."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | jax.Array) else value


def _fields(values: Sampling | Truncation, where: str) -> Fields:
    names = (field.name for field in dataclasses.fields(values))
    return Fields(where, {name: as_python(getattr(values, name)) for name in names})


def keep(logits: jax.Array, truncation: Truncation) -> jax.Array:
    """Which tokens a truncation keeps; always at least the most likely one.

    Args:
      logits: [B, V] float32, -inf for tokens already excluded.

    Returns:
      [B, V] bool. Tokens with exactly the logit of the last one kept are kept too.
    """
    kept = jnp.ones(logits.shape, bool)
    if truncation.top_k is not None or truncation.top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        inside = jnp.ones(ranked.shape, bool)
        if truncation.top_k is not None:
            inside = inside & (jnp.arange(ranked.shape[-1]) < truncation.top_k)[None]
        if truncation.top_p is not None:
            probability = jax.nn.softmax(jnp.where(inside, ranked, -jnp.inf), axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            inside = inside & (before < truncation.top_p)
        inside = inside.at[:, 0].set(True)
        kept = logits >= jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    if truncation.min_p is not None:
        top = jnp.max(logits, axis=-1, keepdims=True)
        kept = kept & (logits >= top + jnp.log(jnp.float32(truncation.min_p)))
    return kept


def draw(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """Picks one token a row.

    Args:
      logits: [B, V] float32.
      keys: [B] random keys.

    Returns:
      [B] int32.
    """
    if sampling.temperature is None:
        return argmax(logits)
    logits = logits / sampling.temperature
    logits = jnp.where(keep(logits, sampling.truncation), logits, -jnp.inf)
    # As jax.random.categorical does.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    return argmax(noise + logits)


def argmax(logits: jax.Array) -> jax.Array:
    """The id of the highest logit, the lowest on ties, [B] int32.

    jnp.argmax is one pass that no CPU compiler vectorises; these are two that are.

    Args:
      logits: [B, V] float32; of NaNs, the last id.
    """
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == top, ids, ids[-1]), axis=-1)


def row_keys(key: jax.Array, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """The random key of each row at a position.

    It depends on nothing else, so a row's draws are the same in any batch, chunk or resumed run.

    Args:
      key: the job's key.
      rows: [B] identities of the rows.
      positions: [B] absolute position of the token to be drawn, in M's context.
    """
    fold = lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position)  # noqa: E731
    return jax.vmap(fold)(rows, positions)
