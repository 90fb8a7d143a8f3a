"""Whether the device computes what a CPU does: the fused step, attention, a training step.

Tiny models with the same weights and prompts run on the device and on the CPU of the same machine,
and in float32 on that CPU, which stands for the exact result. In float32 both must draw the same
tokens. In fewer bits the device may be at most so far from the exact result as twice what the CPU
is: the order of a sum is not the same, but no more bits may be lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.architectures import ARCHITECTURES
from decode.requests import Options, Request, as_schedule
from decode.sampling import Sampling, Truncation
from decode.scheduler import Generator, longest_contexts
from decode.score import Passage, Scorer
from decode.timing import GREEDY
from device_check.figures import Figure, Record
from device_check.sizes import SIZES, Kind, Sizes
from proxy_jax.checkpoints.architecture import random_params
from proxy_jax.models import attention
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import MODULES, init_adapter
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import LoadedTrio, load_trio
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import Recipe, new_state, train_step
from train.timing import random_batch

EXACT = 1e-4  # nats, and relative error, in float32
TIMES = 2.0  # what the CPU's own rounding loses, in fewer bits
_ROWS, _NEW = 4, 12
_SAMPLED = Sampling(0.8, Truncation(top_p=0.95))


def run(sizes: Sizes, record: Record) -> None:
    """Records each comparison, whether it holds, and by how much."""
    exact = [kind for kind in sizes.compared if kind[1] == "float32"]
    for kind in exact:
        record(decoding(kind))
    record(fused_attention(segments=False))
    record(fused_attention(segments=True))
    for dtype in ("float32", "bfloat16"):
        record(training(dtype))
    for kind in sizes.compared:
        if kind not in exact:
            record(decoding(kind))
    record(decoding(exact[0], _SAMPLED))


def decoding(kind: Kind, sampling: Sampling = GREEDY) -> Figure:
    """Compares the tokens and log-probabilities of the fused step, and of scoring."""
    plan, dtype = kind
    trio = SIZES["tiny"].trio(kind)
    on_device = load_trio(trio, plan=plan, stacked_layers=True, place=_place())
    on_cpu = _moved(on_device, jax.devices("cpu")[0])
    exact = _in_float32(on_cpu)
    requests = _requests(on_device)
    with _quick_compiles():
        true_tokens, true_log_probs = _decoded(exact, requests, sampling)
        true_scores = _scored(exact, requests)

    def compared(loaded: LoadedTrio) -> tuple[np.ndarray, float]:
        """Which tokens are the exact ones, so far; and how far the log-probabilities are."""
        tokens, log_probs = _decoded(loaded, requests, sampling)
        same = np.logical_and.accumulate(tokens == true_tokens, axis=1)
        decoded = np.abs(log_probs - true_log_probs)[same].max(initial=0)
        scored = np.abs(_scored(loaded, requests) - true_scores).max()
        return same, float(max(decoded, scored))

    same, error = compared(on_device)
    bound = EXACT
    if dtype != "float32":
        with _quick_compiles():
            _, of_cpu = compared(on_cpu)
        bound = TIMES * max(of_cpu, EXACT)
    holds = error <= bound and (dtype != "float32" or bool(same.all()))
    return {
        "what": "fused step, sampled" if sampling.temperature else "fused step",
        "plan": plan,
        "dtype": dtype,
        "tokens": f"{int(same.sum())} of {same.size}",
        "error": error,
        "bound": bound,
        "holds": holds,
    }


def fused_attention(*, segments: bool) -> Figure:
    """Compares the fused kernel and its gradients with the plain form in float32."""
    length, dtype = 128, jnp.dtype("bfloat16")
    name = "meta-llama/Llama-3.2-1B"
    config = config_from_hf(ARCHITECTURES[name], name).of_one_layer()
    place = _place()
    chosen = attention.kernel(config, place, length, dtype)
    heads = (2, length, config.num_heads, config.head_dim)
    kv_heads = (2, config.num_kv_heads, length, config.head_dim)
    keys = jax.random.split(jax.random.key(1), 4)
    q, k, v, pull = (
        jax.random.normal(key, shape, jnp.float32).astype(dtype).astype(jnp.float32)
        for key, shape in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    of_rows = jnp.asarray(np.repeat([[1, 2]], [50, length - 50], axis=1), jnp.int32)
    ids = jnp.broadcast_to(of_rows, (2, length)) if segments else None
    mask = jnp.tril(jnp.ones((length, length), bool))[None]
    if segments:
        mask = mask & (of_rows[:, :, None] == of_rows[:, None])

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        return attention.attend_fresh(q, k, v, mask, ids, config, place).astype(jnp.float32)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.attend(q, k, v, jnp.broadcast_to(mask, (2, length, length)), config)

    def plain_in_few_bits(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return plain(*(x.astype(dtype) for x in (q, k, v))).astype(jnp.float32)

    def all_of(function: Any) -> list[np.ndarray]:
        out, back = jax.vjp(function, q, k, v)
        return [np.asarray(x) for x in (out, *back(pull))]

    exact, few, ours = (all_of(jax.jit(f)) for f in (plain, plain_in_few_bits, fused))
    error, bound = _furthest(ours, exact), TIMES * _furthest(few, exact)
    return {
        "what": f"attention and gradients, {chosen or 'plain form, no kernel here'}"
        + (", two texts a row" if segments else ""),
        "plan": "",
        "dtype": dtype.name,
        "tokens": "",
        "error": error,
        "bound": bound,
        "holds": error <= bound,
    }


def training(dtype: str) -> Figure:
    """Compares two LoRA steps: the losses, gradients' norms and the adapter."""
    model = config_from_hf(ARCHITECTURES["tiny"], "tiny")
    place, cpu = _place(), Placement(make_mesh({"data": 1}, jax.devices("cpu")[:1]))
    params = random_params(model, "float32", place, stacked=True)
    adapter = init_adapter(params, list(MODULES), 4, jax.random.key(1))
    batch = {name: x[None] for name, x in random_batch(2, 32, model.vocab_size).items()}
    # With a large eps an update is as wrong as its gradient, and not its sign.
    settings = OptimizerConfig(learning_rate=1.0, schedule="constant", max_grad_norm=0, eps=1.0)
    optimizer = make_optimizer(settings, 2)

    def two_steps(place: Placement, dtype: str) -> list[np.ndarray]:
        recipe = Recipe(model, optimizer, dtype, "none", place, lora_scale=2.0)
        here = place.sharding(())
        fresh = jax.tree.map(jnp.copy, adapter)  # the step writes over it
        trained, frozen, rows = jax.device_put((fresh, params, batch), here)
        frozen = jax.tree.map(lambda x: x.astype(dtype), frozen)
        state = new_state(recipe, trained, jax.device_put(jax.random.key(0), here))
        seen: list[np.ndarray] = []
        for _ in range(2):
            state, metrics = train_step(recipe, state, frozen, rows)
            seen += [np.asarray(metrics["loss"]), np.asarray(metrics["grad_norm"])]
        return [*seen, *(np.asarray(x) for x in jax.tree.leaves(state.trained))]

    ours = two_steps(place, dtype)
    with _quick_compiles():
        exact = two_steps(cpu, "float32")
        few = two_steps(cpu, dtype) if dtype != "float32" else exact
    error = _furthest(ours, exact)
    bound = max(EXACT, TIMES * _furthest(few, exact))
    return {
        "what": "two LoRA steps",
        "plan": "",
        "dtype": dtype,
        "tokens": "",
        "error": error,
        "bound": bound,
        "holds": error <= bound,
    }


def _place() -> Placement:
    return Placement(make_mesh({"data": 1}))


def _moved(loaded: LoadedTrio, device: jax.Device) -> LoadedTrio:
    place = Placement(make_mesh({"data": 1}, [device]))
    return dataclasses.replace(
        loaded, params=jax.device_put(loaded.params, place.sharding(())), place=place
    )


def _in_float32(loaded: LoadedTrio) -> LoadedTrio:
    """The same weights, integers as they are, computed with in float32."""

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return dataclasses.replace(
        loaded,
        params=jax.tree.map(wide, loaded.params),
        passes=tuple(dataclasses.replace(one, dtype="float32") for one in loaded.passes),
    )


def _requests(loaded: LoadedTrio) -> list[Request]:
    generator = np.random.default_rng(2)
    return [
        Request(
            row,
            {
                role: generator.integers(512, size=length).tolist()
                for role, length in zip(loaded.trio.roles, lengths, strict=True)
            },
            as_schedule(1.0),
            _NEW,
        )
        for row, lengths in enumerate(((10, 13, 10), (17, 17, 12), (9, 9, 9), (16, 11, 16)))
    ]


def _decoded(
    loaded: LoadedTrio, requests: list[Request], sampling: Sampling
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [B, N], and their log-probabilities under every distribution [B, N, D]."""
    options = Options(
        batch_size=_ROWS,
        max_new_tokens=_NEW,
        sampling=sampling,
        eos_ids=(),
        chunk_steps=_NEW // 3,
        trace=True,
    )
    generator = Generator(loaded, options)
    state = generator.new_state(longest_contexts(requests))
    state = generator.admit(state, dict(enumerate(requests)), {})
    chunks = []
    for _ in range(3):
        state, seen = generator.chunk(state)
        chunks.append(jax.device_get((seen["tokens"], seen["trace"].log_probs)))
    tokens, log_probs = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
    return tokens, log_probs


def _scored(loaded: LoadedTrio, requests: list[Request]) -> np.ndarray:
    """Log-probabilities of random texts after the prompts, [alphas, tokens]."""
    generator = np.random.default_rng(3)
    passages = [Passage(r.ids, generator.integers(512, size=15).tolist()) for r in requests]
    scores = dict(Scorer(loaded, (0.5, 1.0), batch_size=_ROWS).stream(passages))
    return np.concatenate([scores[i].log_probs for i in range(len(passages))], axis=1)


def _furthest(ours: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """The largest error of an array, relative to its norm."""
    pairs = zip(ours, exact, strict=True)
    return max(float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30)) for a, b in pairs)


@contextlib.contextmanager
def _quick_compiles() -> Iterator[None]:
    """For the CPU's programs, which run once: the compiler does not try hard."""
    flag = "jax_disable_most_optimizations"
    before = jax.config.read(flag)
    jax.config.update(flag, True)
    try:
        yield
    finally:
        jax.config.update(flag, before)
