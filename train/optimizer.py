"""AdamW with warm-up, decay and clipping, as the recipes of the field state it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from proxy_jax.errors import InputError
from proxy_jax.reading import Fields

SCHEDULES = ("linear", "cosine", "constant")
# What float32, in which it is computed, does not round to 0, infinity or 1.
SMALLEST, LARGEST = 1e-37, 3e38
LARGEST_BELOW_1 = 0.9999999


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and its schedule.

    Attributes:
      learning_rate: at its peak.
      schedule: after warm-up: linear to 0, cosine (half a period) to 0, or constant.
      warmup_ratio: share of all steps in which the rate rises linearly from 0.
      weight_decay: decoupled; norms and biases are left out.
      max_grad_norm: gradients of a larger global norm are scaled down to it; 0 is off.
      b1, b2, eps: Adam's.

    Raises:
      InputError: names a value that is out of range, also of float32's.
    """

    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        fields = Fields("optimizer", vars(self))
        if fields.string("schedule") not in SCHEDULES:
            raise InputError(
                f"schedule {self.schedule!r} is unknown; known: {', '.join(SCHEDULES)}"
            )
        for name in ("learning_rate", "eps"):
            fields.real(name, SMALLEST, LARGEST)
        for name in ("weight_decay", "max_grad_norm"):
            fields.real(name, 0, LARGEST)
        for name in ("b1", "b2"):
            fields.real(name, 0, LARGEST_BELOW_1)
        fields.real("warmup_ratio", 0, 1)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, from 0 on.

    Args:
      config: the peak and shape.
      steps: of the whole training.
    """
    peak = config.learning_rate
    warmup = -int(-config.warmup_ratio * steps // 1)  # rounded up, as transformers does
    rest = max(steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if not config.max_grad_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: all but norms and biases."""

    def is_decayed(path: tuple, leaf: jax.Array) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return not names[-1].endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(is_decayed, params)
