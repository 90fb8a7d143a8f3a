"""What can be recorded of each step: what every model thought of the token that was drawn.

Letters: B slots, T steps, D distributions, K alternatives, V vocabulary.

The distributions are "proxy", then each role of the trio. "proxy" is the softmax of the combined
logits over the ids that may be generated and, with a base filter, that it keeps; before processors,
temperature and truncation, so that figures of sampled and greedy runs mean the same. M's is over
the ids that may be generated; those of M+ and M- over the ids that mean the same in all models,
and the others have probability 0 there.

Each step's figures are computed where its logits are, by `measure`, and only they leave the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxy_jax.combine import fit

ALTERNATIVES = 5  # K, the likeliest tokens of each distribution that are recorded
_DIGITS = 4  # of figures in files

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """Figures of some steps. The leading axes "..." are [B] in a step, [B, T] in a chunk and [T]
    in a completion.

    Attributes:
      names: the D distributions.
      log_probs: [..., D] float32, of the token that was drawn, in nats; -inf where it has none.
      ranks: [..., D] int32, how many tokens come before it: likelier, or as likely with a lower id.
      entropies: [..., D] float32, in nats.
      top_ids: [..., D, K] int32, the likeliest tokens, best first, lower ids first among equals.
      top_log_probs: [..., D, K] float32; -inf for an id that has no probability.
      kl: [...] float32, KL(proxy || M) in nats.
      overlap: [...] float32, the sum over tokens of min(p_proxy, p_expert): the chance that
        speculative decoding accepts what M+ drafts (Leviathan et al. 2023, corollary 3.6); None
        without M+.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    log_probs: Array
    ranks: Array
    entropies: Array
    top_ids: Array
    top_log_probs: Array
    kl: Array
    overlap: Array | None

    @classmethod
    def empty(cls, names: tuple[str, ...], shape: tuple[int, ...]) -> Trace:
        """Zeros to write steps into; shape is that of the leading axes."""
        one, top = (*shape, len(names)), (*shape, len(names), ALTERNATIVES)
        return cls(
            names=names,
            log_probs=jnp.zeros(one),
            ranks=jnp.zeros(one, jnp.int32),
            entropies=jnp.zeros(one),
            top_ids=jnp.zeros(top, jnp.int32),
            top_log_probs=jnp.zeros(top),
            kl=jnp.zeros(shape),
            overlap=jnp.zeros(shape) if "expert" in names else None,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Trace:
        """The completion's trace that `as_dict` wrote, to its digits."""
        names = tuple(name for name, value in fields.items() if isinstance(value, dict))

        def stacked(key: str, dtype: type = np.float32) -> np.ndarray:
            return np.stack([_array(fields[name][key], dtype) for name in names], axis=1)

        return cls(
            names=names,
            log_probs=stacked("log_probs"),
            ranks=stacked("ranks", np.int32),
            entropies=stacked("entropies"),
            top_ids=stacked("top_ids", np.int32),
            top_log_probs=stacked("top_log_probs"),
            kl=_array(fields["kl"]),
            overlap=_array(fields["overlap"]) if "overlap" in fields else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """A completion's trace for a JSON file: by distribution, then kl and overlap.

        Figures have four decimals; None stands for the logarithm of probability 0.
        """
        fields: dict[str, Any] = {
            name: {
                "log_probs": _listed(self.log_probs[:, d]),
                "ranks": np.asarray(self.ranks[:, d]).tolist(),
                "entropies": _listed(self.entropies[:, d]),
                "top_ids": np.asarray(self.top_ids[:, d]).tolist(),
                "top_log_probs": _listed(self.top_log_probs[:, d]),
            }
            for d, name in enumerate(self.names)
        }
        fields["kl"] = _listed(self.kl)
        if self.overlap is not None:
            fields["overlap"] = _listed(self.overlap)
        return fields

    def probs(self, name: str) -> np.ndarray:
        """[...], probability of the token that was drawn under a distribution."""
        return np.exp(self.log_probs[..., self.names.index(name)])

    @property
    def deltas(self) -> np.ndarray:
        """[...], p_proxy - p_M of the token that was drawn (Liu et al. 2024, section 6.1)."""
        return self.probs("proxy") - self.probs("base")

    @property
    def raised(self) -> np.ndarray:
        """[...], log p_proxy - log p_M: by how much the tuning raised the token, in nats."""
        proxy, base = self.names.index("proxy"), self.names.index("base")
        return np.asarray(self.log_probs[..., proxy] - self.log_probs[..., base])

    @property
    def changed(self) -> np.ndarray:
        """[...] bool, whether the likeliest token is another one than M's."""
        proxy, base = self.names.index("proxy"), self.names.index("base")
        return np.asarray(self.top_ids[..., proxy, 0] != self.top_ids[..., base, 0])


def of_slot(chunk: Trace, slot: int, drawn: np.ndarray) -> Trace:
    """The steps [T] bool of a chunk [B, T] in which a slot drew a token."""
    return jax.tree.map(lambda x: x[slot, drawn], chunk)


def joined(pieces: Sequence[Trace], count: int) -> Trace:
    """The first `count` steps of pieces [T] that follow each other."""
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *pieces)


def distributions(roles: Sequence[str]) -> tuple[str, ...]:
    """The names of what is recorded for a trio with these roles."""
    return ("proxy", *roles)


def measure(
    combined: jax.Array,
    logits: Mapping[str, jax.Array],
    token: jax.Array,
    shared: jax.Array,
    valid: jax.Array,
) -> Trace:
    """The figures of one step.

    Args:
      combined: [B, V] float32, -inf for tokens that are excluded.
      logits: of each role, [B, V'] float32; V' may differ from V.
      token: [B] int32, what was drawn.
      shared, valid: [V] bool, as in decode.engine.Settings.
    """
    scores = {"proxy": combined}
    for role, own in logits.items():
        there = valid if role == "base" else shared
        scores[role] = jnp.where(there[None], fit(own, combined.shape[-1]), -jnp.inf)
    totals = {name: jax.nn.logsumexp(s, axis=-1)[:, None] for name, s in scores.items()}
    log_probs = {name: s - totals[name] for name, s in scores.items()}
    proxy = log_probs["proxy"]
    overlap = None
    if "expert" in logits:
        overlap = jnp.sum(jnp.exp(jnp.minimum(proxy, log_probs["expert"])), axis=-1)
    # Ranked by scores: rounding may make two of them one log-probability.
    top = {name: jax.lax.top_k(s, ALTERNATIVES) for name, s in scores.items()}
    return Trace(
        names=distributions(tuple(logits)),
        log_probs=jnp.stack([_at(token, s) for s in log_probs.values()], axis=-1),
        ranks=jnp.stack([_rank(token, s) for s in scores.values()], axis=-1),
        entropies=jnp.stack([-_mean(s, s) for s in log_probs.values()], axis=-1),
        top_ids=jnp.stack([ids for _, ids in top.values()], axis=-2),
        top_log_probs=jnp.stack([s - totals[name] for name, (s, _) in top.items()], axis=-2),
        # Rounding may leave a little less than 0.
        kl=jnp.maximum(_mean(proxy, proxy - log_probs["base"]), 0.0),
        overlap=overlap,
    )


def _at(token: jax.Array, scores: jax.Array) -> jax.Array:
    """Each row's value [B] at its token; a reduction, so that a vocabulary that is cut over devices
    stays where it is."""
    ids = jnp.arange(scores.shape[-1])[None]
    return jnp.max(jnp.where(ids == token[:, None], scores, -jnp.inf), axis=-1)


def _rank(token: jax.Array, scores: jax.Array) -> jax.Array:
    """[B] int32, how many tokens come before the given one."""
    ids, own = jnp.arange(scores.shape[-1])[None], _at(token, scores)[:, None]
    before = (scores > own) | ((scores == own) & (ids < token[:, None]))
    return jnp.sum(before & (ids != token[:, None]), axis=-1, dtype=jnp.int32)


def _mean(log_probs: jax.Array, values: jax.Array) -> jax.Array:
    """[B], the mean of values [B, V] under a distribution; ids without probability do not count."""
    return jnp.sum(jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * values, 0.0), axis=-1)


def _listed(values: Array) -> list[Any]:
    array = np.asarray(values, np.float64).round(_DIGITS) + 0.0  # no -0.0
    return np.where(np.isneginf(array), np.array(None), array).tolist()


def _array(values: Sequence[Any], dtype: type = np.float32) -> np.ndarray:
    array = np.asarray(values, np.float64)  # None becomes NaN
    return np.where(np.isnan(array), -np.inf, array).astype(dtype)
