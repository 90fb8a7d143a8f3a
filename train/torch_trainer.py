"""The same training step by transformers' Trainer (and peft) on torch, to compare speeds with."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from proxy_jax.errors import InputError

_IGNORED = -100  # the label of a token without a loss, in transformers


def trainer_step_seconds(
    hf_config: dict[str, Any],
    batch: dict[str, np.ndarray],
    *,
    steps: int,
    bfloat16: bool,
    rank: int = 0,
    modules: Sequence[str] = (),
    recompute: bool = False,
) -> list[float]:
    """Seconds of each step, the first left out.

    Weights are random: speed does not depend on them. The Trainer reads the same tokens, with a
    loss at the same places, as plain rows: that examples in one row do not see each other is not
    asked of it, which spares it work.

    Args:
      hf_config: the architecture, as config.json states it.
      batch: "tokens", "targets" and "weights", [B, T].
      steps: to time.
      bfloat16: compute in it, on float32 parameters.
      rank: of a LoRA adapter; 0 trains all parameters.
      modules: what it adapts.
      recompute: activations in the backward pass (gradient checkpointing).

    Raises:
      InputError: torch, accelerate or peft is not installed.
    """
    try:
        import torch
        import transformers

        if rank:
            import peft
    except ImportError as error:
        raise InputError(f"benchmark.compare is 'torch': {error}; see the test extras") from error
    known = {k: v for k, v in hf_config.items() if k != "architectures"}
    model: Any = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**known), dtype=torch.float32
    )
    if rank:
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=list(modules)))
        if recompute:
            model.enable_input_require_grads()
    rows = []
    for tokens, targets, weights in zip(
        batch["tokens"], batch["targets"], batch["weights"], strict=True
    ):
        labels = np.where(weights > 0, targets, _IGNORED)
        labels = np.concatenate([[_IGNORED], labels[:-1]])  # the model shifts them back
        rows.append({"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels)})

    class Clock(transformers.TrainerCallback):
        seconds: list[float]

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.seconds = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.since = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.since)

    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            directory,
            per_device_train_batch_size=len(rows),
            max_steps=steps + 1,
            bf16=bfloat16,
            gradient_checkpointing=recompute,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        transformers.Trainer(
            model=model, args=arguments, train_dataset=rows * (steps + 1), callbacks=[clock]
        ).train()
    return clock.seconds[1:]
