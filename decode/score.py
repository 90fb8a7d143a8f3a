"""Teacher-forced scoring: the log-likelihood of given texts under the combined distribution.

Letters: A coefficients (alphas), B rows of a batch, T tokens of a context and continuation, J
places of a continuation, R roles of a pass, D model width, V vocabulary.

    hidden    runs one pass over contexts and continuations; compiled once per length bucket
    judge     logits of a few places at a time, combined with each alpha in turn

Each model reads a text once, whatever the number of alphas. Logits [B, J, V] are never held as a
whole: a piece has about _PIECE_TOKENS tokens, and of its combined logits those of one alpha.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode.engine import Program
from decode.requests import Schedule, as_schedule, checked_beta, checked_filter
from decode.sampling import INT32, Truncation, keep
from decode.scheduler import bucket
from proxy_jax.combine import combine
from proxy_jax.errors import InputError
from proxy_jax.models.decoder import Params, hidden_states, unembed
from proxy_jax.reading import Fields
from proxy_jax.tokenization import Prompt, encode
from proxy_jax.trio import LoadedTrio, Pass, Role, Trio

# Tokens, on each of the devices that the batch is cut over.
_PIECE_TOKENS = 128  # whose logits are held at once
_BATCH_TOKENS = 4096  # of one pass, padding included; more do not make it quicker


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text to score.

    Attributes:
      contexts: by role, the ids before it, none empty.
      ids: of the text, the same for every role.
    """

    contexts: Mapping[Role, Sequence[int]]
    ids: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Score:
    """What the combined distribution says of a text of n tokens, for each of A alphas.

    Attributes:
      log_probs: [A, n] float32, log-probability of each token given those before it, in nats;
        -inf for a token that decoding never draws.
      greedy: [A, n] bool, whether no other token is likelier.
    """

    log_probs: np.ndarray
    greedy: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        """[A] float64, log-likelihood of the text, in nats."""
        return self.log_probs.sum(axis=-1, dtype=np.float64)

    @property
    def all_greedy(self) -> np.ndarray:
        """[A] bool, whether greedy decoding would write the text."""
        return np.asarray(self.greedy.all(axis=-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distribution:
    """The traced values that say which distribution is meant; see decode.engine.Settings.

    Attributes:
      alphas: [A, J] float32, each coefficient at each place of a continuation.
      beta, base_filter, shared, valid: as in Settings.
    """

    alphas: jax.Array
    beta: jax.Array | None
    base_filter: Truncation | None
    shared: jax.Array
    valid: jax.Array


class Scorer:
    """Scores texts with a loaded trio, for several alphas at the cost of little more than one.

    Args:
      loaded: the trio's weights.
      alphas: coefficients of the offset: numbers, or schedules over the tokens of a continuation.
      beta, base_filter: as in Options.
      batch_size: most texts that are scored together.

    Raises:
      InputError: no alpha or a malformed one, another value out of range, or a batch that the mesh
        does not divide.
    """

    def __init__(
        self,
        loaded: LoadedTrio,
        alphas: Sequence[float | Schedule] = (1.0,),
        *,
        beta: float = 1.0,
        base_filter: Truncation | None = None,
        batch_size: int = 8,
    ):
        if not alphas:
            raise InputError("alphas is empty: which coefficients are scored?")
        batch_size = Fields("scorer", {"batch_size": batch_size}).integer("batch_size", 1, INT32)
        loaded.place.check_divides("batch", batch_size, "batch_size")
        self.loaded = loaded
        self.alphas = [as_schedule(alpha) for alpha in alphas]
        beta = checked_beta(beta)
        self.beta = None if beta == 1.0 else jnp.float32(beta)
        self.base_filter = checked_filter(base_filter)
        self.batch_size = batch_size
        self.program = Program.of(loaded)

    def score(self, pairs: Sequence[tuple[str | Prompt, str]]) -> list[Score]:
        """Scores continuations of prompts, in order; see `make_passages`."""
        scores = dict(self.stream(make_passages(self.loaded.trio, pairs)))
        return [scores[i] for i in range(len(scores))]

    def stream(self, passages: Sequence[Passage]) -> Iterator[tuple[int, Score]]:
        """Yields each passage's index and score, the longest first.

        A score does not depend on which other passages there are.

        Raises:
          InputError: a passage that is empty or too long, or a model's numbers became NaN or
            infinite.
        """
        for index, passage in enumerate(passages):
            self._check(index, passage)
        buckets: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        for index, passage in enumerate(passages):
            buckets[self._lengths(passage)].append(index)
        for lengths, members in sorted(buckets.items(), reverse=True):
            count = self._rows(max(lengths))
            members = sorted(members, key=lambda i: len(passages[i].ids), reverse=True)
            for first in range(0, len(members), count):
                batch = members[first : first + count]
                found = self._score_batch([passages[i] for i in batch], lengths, count)
                found = jax.device_get(found)
                for row, index in enumerate(batch):
                    self._refuse_broken(index, found["broken"][row])
                    size = len(passages[index].ids)
                    yield (
                        index,
                        Score(found["log_probs"][:, row, :size], found["greedy"][:, row, :size]),
                    )

    def _check(self, index: int, passage: Passage) -> None:
        name = f"passage {index}"
        if not passage.ids:
            raise InputError(f"{name}: nothing to score")
        for role, member in self.loaded.trio.members.items():
            context, limit = passage.contexts[role], member.config.max_positions
            if not context:
                raise InputError(f"{name}: no context for {role}")
            lowest, highest = min(*context, *passage.ids), max(*context, *passage.ids)
            if lowest < 0:
                raise InputError(f"{name}: {lowest} is no id")
            if highest >= member.config.vocab_size:
                raise InputError(
                    f"{name}: id {highest} is beyond the {member.config.vocab_size} rows of {role}"
                )
            if len(context) + len(passage.ids) - 1 > limit:
                raise InputError(
                    f"{name}: {len(context)} tokens of context for {role} and {len(passage.ids)} "
                    f"to score exceed its context of {limit}"
                )

    def _lengths(self, passage: Passage) -> tuple[int, ...]:
        """By pass, what a passage is padded to. The last token is scored but not read."""
        longest = (
            max(len(passage.contexts[role]) for role in p.roles) for p in self.program.passes
        )
        return tuple(bucket(length + len(passage.ids) - 1) for length in longest)

    def _rows(self, length: int) -> int:
        """Passages of a length that are scored together."""
        parts = self.loaded.place.split("batch")
        count = min(self.batch_size, max(1, _BATCH_TOKENS * parts // length))
        return -(-count // parts) * parts

    def _score_batch(
        self, passages: Sequence[Passage], lengths: Sequence[int], count: int
    ) -> dict[str, jax.Array]:
        places = lengths[0]  # a continuation is no longer than M's tokens
        targets, counts = np.zeros((count, places), np.int32), np.zeros(count, np.int32)
        for row, passage in enumerate(passages):
            targets[row, : len(passage.ids)] = passage.ids
            counts[row] = len(passage.ids)
        states, starts = [], []
        for index, (one, length) in enumerate(zip(self.program.passes, lengths, strict=True)):
            tokens = np.zeros((len(one.roles), count, length), np.int32)
            start = np.zeros(tokens.shape[:2], np.int32)
            for r, role in enumerate(one.roles):
                for row, passage in enumerate(passages):
                    ids = [*passage.contexts[role], *passage.ids[:-1]]
                    tokens[r, row, : len(ids)] = ids
                    start[r, row] = len(passage.contexts[role]) - 1
            states.append(hidden(self.program, index, self.loaded.params[index], tokens))
            starts.append(start)
        return judge(
            self.program, self.loaded.params, tuple(states), tuple(starts), targets, counts,
            self._distribution(places),
        )  # fmt: skip

    def _distribution(self, places: int) -> Distribution:
        vocabulary = self.loaded.trio.vocabulary
        alphas = np.zeros((len(self.alphas), places), np.float32)
        for row, schedule in zip(alphas, self.alphas, strict=True):
            for start, value in schedule:
                row[start:] = value
        return Distribution(
            alphas=alphas,  # type: ignore[arg-type]
            beta=self.beta,
            base_filter=self.base_filter,
            shared=vocabulary.shared,  # type: ignore[arg-type]
            valid=vocabulary.valid,  # type: ignore[arg-type]
        )

    def _refuse_broken(self, index: int, broken: np.ndarray) -> None:
        if broken.any():
            reasons = [
                *(f"the {role} model became NaN or infinite" for role in self.program.roles),
                "the combined logits became NaN or infinite",
            ]
            raise InputError(f"passage {index}: {reasons[int(np.argmax(broken))]}")


def make_passages(trio: Trio, pairs: Sequence[tuple[str | Prompt, str]]) -> list[Passage]:
    """Tokenises continuations of prompts for every role.

    The continuation's ids are those that follow the prompt's in prompt and continuation tokenised
    together; blanks that end the prompt belong to the continuation (lm-eval's convention).

    Args:
      trio: its tokenizer and templates.
      pairs: (prompt, continuation).

    Raises:
      InputError: an empty prompt.
    """
    passages = []
    for index, (prompt, continuation) in enumerate(pairs):
        prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
        part = "response_prefix" if prompt.response_prefix else "text"
        text = getattr(prompt, part)
        if not text.strip():
            raise InputError(f"passage {index}: empty prompt")
        prompt = dataclasses.replace(prompt, **{part: text.rstrip()})
        context = prompt.text + prompt.response_prefix
        whole = context + text[len(text.rstrip()) :] + continuation
        before, ids = (encode(trio.tokenizer, text) for text in (context, whole))
        passages.append(Passage(trio.encode(prompt), ids[len(before) :]))
    return passages


@functools.partial(jax.jit, static_argnums=(0, 1))
def hidden(program: Program, index: int, params: Params, tokens: jax.Array) -> jax.Array:
    """The last layer's output of one pass, for `judge`.

    Args:
      program, index: which pass; static.
      params: the pass's.
      tokens: [R, B, T] int32, right-padded.

    Returns:
      [R, B, T, D].
    """
    one = program.passes[index]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[2])[None], tokens.shape[1:])

    def run(params: Params, tokens: jax.Array) -> jax.Array:
        return hidden_states(one.config, params, tokens, positions, None, program.place)[0]

    with jax.named_scope("_".join(one.roles)):
        return _each_role(one, run, params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def judge(
    program: Program,
    params: Sequence[Params],
    states: Sequence[jax.Array],
    starts: Sequence[jax.Array],
    targets: jax.Array,
    counts: jax.Array,
    distribution: Distribution,
) -> dict[str, jax.Array]:
    """Log-probabilities of continuations, given every model's hidden states.

    Args:
      program: static.
      params: of each pass.
      states: of each pass, [R, B, T, D].
      starts: of each pass, [R, B] int32, the place whose state predicts the first token.
      targets: [B, J] int32, the continuations, right-padded.
      counts: [B] int32, how many of them are real.
      distribution: what is combined how.

    Returns:
      "log_probs" [A, B, J] float32 and "greedy" [A, B, J] bool, undefined beyond the counts;
      "broken" [B, all roles + 1] bool, whether a model's states, or last a log-probability, were
      ever NaN (or a state infinite).
    """
    batch, places = targets.shape
    held, together = _piece(batch // program.place.split("batch"), places)
    longest = jnp.max(counts)

    def piece(i: jax.Array, carry: Any) -> Any:
        first = i * held
        log_probs, greedy, broken = carry
        real = (first + jnp.arange(held))[None] < counts[:, None]
        logits: dict[str, jax.Array] = {}
        failures = []
        for one, tree, state, start in zip(program.passes, params, states, starts, strict=True):
            at = start[..., None] + first + jnp.arange(held)[None, None]
            x = jnp.take_along_axis(state, at[..., None], axis=2, mode="clip")
            run = lambda tree, x, one=one: unembed(one.config, tree, x, program.place)  # noqa: E731
            out = _each_role(one, run, tree, x)
            logits |= {role: out[r] for r, role in enumerate(one.roles)}
            finite = jnp.all(jnp.isfinite(x), axis=-1)
            failures += [jnp.any(real & ~finite[r], axis=-1) for r in range(len(one.roles))]

        def few(j: jax.Array, carry: Any) -> Any:
            log_probs, greedy = carry
            cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, together, 1)  # noqa: E731
            # [B, together, ...] -> [B together, ...]
            rows = lambda x: x.reshape(batch * together, *x.shape[2:])  # noqa: E731
            at = first + j * together
            target = rows(cut(targets, at))
            part = {role: rows(cut(s, j * together)) for role, s in logits.items()}
            alphas = jnp.broadcast_to(
                cut(distribution.alphas, at)[:, None], (len(distribution.alphas), batch, together)
            )
            found = _judge_rows(part, target, alphas.reshape(-1, batch * together), distribution)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(whole, new.reshape(alphas.shape), at, 2)
                for whole, new in zip((log_probs, greedy), found, strict=True)
            )

        steps = -(-jnp.minimum(held, longest - first) // together)
        log_probs, greedy = jax.lax.fori_loop(0, steps, few, (log_probs, greedy))
        new = jax.lax.dynamic_slice_in_dim(log_probs, first, held, 2)
        failures.append(jnp.any(jnp.isnan(new) & real[None], axis=(0, 2)))
        return log_probs, greedy, broken | jnp.stack(failures, axis=-1)

    shape = (len(distribution.alphas), batch, places)
    start = (
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, bool),
        jnp.zeros((batch, len(program.roles) + 1), bool),
    )
    found = jax.lax.fori_loop(0, -(-longest // held), piece, start)
    found = [program.place.constrain(x, (None,) * x.ndim) for x in found]
    return dict(zip(("log_probs", "greedy", "broken"), found, strict=True))


def _judge_rows(
    logits: Mapping[str, jax.Array],
    target: jax.Array,
    alphas: jax.Array,
    distribution: Distribution,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of targets [N], and whether none is likelier, [A, N]; logits [N, V].

    One alpha after the other: the memory does not grow with their number.
    """
    base = logits["base"]
    expert, anti = logits.get("expert", base), logits.get("antiexpert", base)
    allowed = jnp.broadcast_to(distribution.valid, base.shape)
    if distribution.base_filter is not None:
        kept = keep(jnp.where(allowed, base, -jnp.inf), distribution.base_filter)
        allowed = allowed & kept

    def one(alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
        offsets = [(expert, anti, alpha)] if len(logits) > 1 else []
        if distribution.beta is not None:
            offsets.append((base, anti, jnp.broadcast_to(distribution.beta - 1.0, alpha.shape)))
        combined = combine(base, offsets, distribution.shared)
        combined = jnp.where(allowed, combined, -jnp.inf)
        top = jnp.max(combined, axis=-1)
        chosen = jnp.take_along_axis(combined, target[:, None], axis=-1)[:, 0]
        whole = jnp.sum(jnp.exp(combined - top[:, None]), axis=-1)
        return chosen - top - jnp.log(whole), chosen >= top

    with jax.named_scope("combine"):
        return jax.lax.map(one, alphas)


def _piece(batch: int, places: int) -> tuple[int, int]:
    """Places of each row whose logits are held, and those combined together; powers of two.

    Args:
      batch: rows on a device.
      places: J.

    On a CPU, one place of every row at a time: the logits stay in its cache while every alpha
    reads them. On accelerators a whole piece.
    """
    held = min(places, 1 << max(0, (_PIECE_TOKENS // batch).bit_length() - 1))
    return held, 1 if jax.default_backend() == "cpu" else held


def _each_role(one: Pass, run: Any, params: Params, x: jax.Array) -> jax.Array:
    """run(params, x[r]) for each role of a pass, [R, ...]."""
    if len(one.roles) == 1:
        return run(params, x[0])[None]
    return jax.vmap(run, in_axes=(None if one.shared else 0, 0))(params, x)
