"""Times prefill and decoding of a loaded trio, and what the hardware would allow."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode.requests import Options, Request, as_schedule
from decode.sampling import Sampling
from decode.scheduler import Generator, longest_contexts
from proxy_jax.trio import LoadedTrio, Trio

GREEDY = Sampling()
_PROBED = 2**28  # bytes read to measure the bandwidth,
_IN_A_ROW = 20  # so many times, so that the start of a product does not count


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch to decode.

    Attributes:
      batch: rows.
      prompt: tokens of each prompt.
      output: new tokens of each row.
    """

    batch: int
    prompt: int
    output: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompt} -> {self.output}"

    def tokens(self, vocabulary: int) -> np.ndarray:
        """Random prompts, [B, T]."""
        return np.random.default_rng(0).integers(vocabulary, size=(self.batch, self.prompt))

    def requests(self, trio: Trio, alpha: float) -> list[Request]:
        """Makes requests of random prompts, the same for every role."""
        vocabulary = min(member.config.vocab_size for member in trio.members.values())
        return [
            Request(row, dict.fromkeys(trio.roles, ids), as_schedule(alpha), self.output)
            for row, ids in enumerate(self.tokens(vocabulary).tolist())
        ]


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each repeat.

    Attributes:
      prefill: from the ids on the host to the prompts in the caches, or, of a loop that prefills
        as it draws the first token, until that token.
      decode: of all steps after it.
      steps: how many these are.
    """

    prefill: list[float]
    decode: list[float]
    steps: int


def base_alone(loaded: LoadedTrio) -> LoadedTrio:
    """M of a trio as one by itself, on the same arrays."""
    trio = Trio({"base": loaded.trio.members["base"]}, loaded.trio.vocabulary)
    return dataclasses.replace(
        loaded, trio=trio, passes=loaded.passes[:1], params=loaded.params[:1]
    )


def measure(
    loaded: LoadedTrio,
    case: Case,
    *,
    alpha: float,
    chunk_steps: int,
    repeats: int,
    sampling: Sampling = GREEDY,
) -> Times:
    """Runs what the Generator runs, after one run that compiles and warms up.

    Args:
      loaded: a trio, or M alone.
      case: the batch; no row ends early.
      alpha: the coefficient.
      chunk_steps: steps between two looks of the host.
      repeats: measured runs.
      sampling: how tokens are drawn; greedy by default.
    """
    options = Options(
        batch_size=case.batch,
        max_new_tokens=case.output,
        alpha=alpha,
        sampling=sampling,
        eos_ids=(),
        chunk_steps=min(chunk_steps, case.output),
    )
    generator = Generator(loaded, options)
    requests = case.requests(loaded.trio, alpha)
    contexts = longest_contexts(requests)
    times = Times([], [], case.output)
    for repeat in range(repeats + 1):
        state = jax.block_until_ready(generator.new_state(contexts))
        started = time.perf_counter()
        state = generator.admit(state, dict(enumerate(requests)), {})
        jax.block_until_ready(state)
        prefilled = time.perf_counter()
        active = True
        while active:
            state, seen = generator.chunk(state)
            active = bool(jax.device_get(seen)["active"].any())
        if repeat:
            times.prefill.append(prefilled - started)
            times.decode.append(time.perf_counter() - prefilled)
    return times


def step_bytes(loaded: LoadedTrio, case: Case) -> int:
    """What a device must read at a step halfway through the output.

    Every pass's weights once, of the embedding next to nothing unless it is the head, too; and each
    role's keys and values so far.
    """
    total = 0.0
    for one, params in zip(loaded.passes, loaded.params, strict=True):
        held = jax.tree.map(_held, params)
        unread = 0 if one.config.tied_head else held["embedding"]
        total += sum(jax.tree.leaves(held)) - unread
        config, place = one.config, loaded.place
        slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        slots = len(one.roles) * case.batch * (case.prompt + case.output / 2)
        parts = place.split(place.attention_rows(case.batch)) * place.split("kv_heads")
        total += slots * slot * jnp.dtype(one.dtype).itemsize / parts
    return int(total)


def bandwidth() -> float:
    """Bytes a second that matrix-vector products read on one device, the best of five rows."""
    matrix = jnp.ones((4096, _PROBED // 4 // 4096), jnp.float32)
    vector = jnp.ones((1, 4096), jnp.float32)
    run = jax.jit(lambda vector, matrix: vector @ matrix)
    jax.block_until_ready(run(vector, matrix))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready([run(vector, matrix) for _ in range(_IN_A_ROW)])
        best = min(best, time.perf_counter() - started)
    return _IN_A_ROW * matrix.nbytes / best


def _held(leaf: Any) -> int:
    return leaf.addressable_shards[0].data.nbytes
