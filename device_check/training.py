"""Prefill of a long batch, and a training step of the largest model that fits: speed and memory.

Each is a process of its own, so that the peak of its memory is its own.
"""

from __future__ import annotations

import statistics

import jax

from configs.architectures import ARCHITECTURES
from decode import timing
from device_check.decoding import peak_bytes, placement
from device_check.figures import Figure, Record
from device_check.sizes import RANK, Sizes
from proxy_jax.checkpoints.architecture import random_params
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import MODULES, init_adapter
from proxy_jax.trio import load_trio
from train.flops import forward_flops, peak_flops, step_flops
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import Recipe, new_state, train_step
from train.timing import random_batch, time_steps


def prefill(sizes: Sizes, record: Record) -> None:
    """Records how fast prompts are read by all three models."""
    trio = sizes.trio(("separate", "bfloat16"))
    loaded = load_trio(trio, place=placement())
    case = sizes.prefill
    times = timing.measure(loaded, case, alpha=1.0, chunk_steps=case.output, repeats=sizes.repeats)
    seconds = statistics.median(times.prefill)
    # The last token of a prompt is fed by the first step.
    length = case.prompt - 1
    tokens = case.batch * length
    # Its logits are not made.
    read = {"tokens": tokens, "trained_tokens": 0, "pairs": tokens * (length + 1) / 2}
    flops = sum(sum(forward_flops(m.config, read)) for m in trio.members.values())
    record(
        {
            "what": f"prefill of {case.batch} x {case.prompt}, the trio",
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / _peak(),
            "peak_bytes": peak_bytes(),
        }
    )


def lora(sizes: Sizes, record: Record) -> None:
    """Records a LoRA step."""
    _largest(sizes, record, rank=RANK)


def full(sizes: Sizes, record: Record) -> None:
    """Records a step of all parameters."""
    _largest(sizes, record, rank=0)


def _largest(sizes: Sizes, record: Record, *, rank: int) -> None:
    for name in sizes.trained:
        figure = _step(sizes, name, rank)
        record(figure)
        if "seconds" in figure:
            return


def _step(sizes: Sizes, name: str, rank: int) -> Figure:
    model, place = config_from_hf(ARCHITECTURES[name], name), placement()
    stacked = place.platform != "cpu"
    optimizer = make_optimizer(OptimizerConfig(), 10)
    recipe = Recipe(model, optimizer, "bfloat16", "full", place, lora_scale=1.0 if rank else None)
    kind = f"LoRA, rank {rank}" if rank else "all parameters"
    figure: Figure = {"what": f"step of {name}, {kind}, {sizes.rows} x {sizes.length}"}
    rows = random_batch(sizes.rows, sizes.length, model.vocab_size)
    batch = {key: jax.device_put(x[None], place.sharding(())) for key, x in rows.items()}
    try:
        params = random_params(model, "bfloat16" if rank else "float32", place, stacked=stacked)
        trained, frozen = params, None
        if rank:
            trained, frozen = init_adapter(params, list(MODULES), rank, jax.random.key(1)), params
        state = new_state(recipe, trained, jax.random.key(2))
        del params, trained
        step = train_step.lower(recipe, state, frozen, batch).compile()
        seconds, metrics = time_steps(step, state, frozen, batch, sizes.repeats)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**figure, "left_out": str(error).splitlines()[0]}
    median = statistics.median(seconds)
    return {
        **figure,
        "seconds": median,
        "tokens_per_second": metrics["tokens"] / median,
        "mfu": step_flops(model, metrics, lora=rank > 0) / median / _peak(),
        "loss": metrics["loss"],
        "peak_bytes": peak_bytes(),
    }


def _peak() -> float:
    """Operations a second that one device is said to do, or does."""
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return peak_flops("bfloat16") / devices
