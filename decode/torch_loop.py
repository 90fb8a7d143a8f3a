"""Proxy-tuning as an eager loop over transformers' models on torch, to compare speeds with.

As the published implementation runs it: the three models one after the other, each with a cache
of its own that grows by a step's keys and values, and a mask that grows by a column.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from proxy_jax.errors import InputError


class TorchTrio:
    """Random models of the architectures of a trio: speed does not depend on the weights.

    Args:
      hf_configs: architectures of M, and of M+ and M- where present, as config.json states them.
      dtype: of weights and activations, "float32" or "bfloat16", ....
      alpha: the coefficient.

    Raises:
      InputError: torch is not installed.
    """

    def __init__(self, hf_configs: Sequence[dict[str, Any]], dtype: str, alpha: float = 1.0):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise InputError(f"benchmark.compare is 'torch': {error}; pip install torch") from error
        self._torch, self._transformers = torch, transformers
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.alpha = alpha
        self.models: list[Any] = []
        for fields in hf_configs:
            known = {key: value for key, value in fields.items() if key != "architectures"}
            config = transformers.AutoConfig.for_model(**known)
            with torch.device(self.device):
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=getattr(torch, dtype)
                )
            self.models.append(model.eval())

    def decode(
        self, tokens: np.ndarray, steps: int, eos: Sequence[int], *, alone: bool = False
    ) -> tuple[np.ndarray, float, float]:
        """Greedy decoding of one batch.

        Args:
          tokens: [B, T] int, the prompts.
          steps: new tokens.
          eos: ids that are not drawn.
          alone: M without the others.

        Returns:
          The new tokens [B, steps], seconds until the first of them, and those of the others.
        """
        torch = self._torch
        models = self.models[:1] if alone else self.models
        with torch.inference_mode():
            caches = [self._transformers.DynamicCache() for _ in models]
            fed = torch.tensor(tokens, device=self.device)
            mask, drawn = torch.ones_like(fed), []
            started = self._now()
            for step in range(steps):
                scores = [
                    model(
                        input_ids=fed, attention_mask=mask, past_key_values=cache, use_cache=True
                    ).logits[:, -1]
                    for model, cache in zip(models, caches, strict=True)
                ]
                combined = scores[0]
                if len(scores) == 3:
                    # Vocabularies may end in more or fewer rows of padding.
                    size = min(score.shape[-1] for score in scores)
                    offset = scores[1][:, :size] - scores[2][:, :size]
                    combined[:, :size] += self.alpha * offset
                combined[:, list(eos)] = -torch.inf
                fed = combined.argmax(dim=-1, keepdim=True)
                mask = torch.cat([mask, torch.ones_like(fed)], dim=-1)
                drawn.append(fed)
                if step == 0:
                    first = self._now()
            last = self._now()
        return torch.cat(drawn, dim=-1).cpu().numpy(), first - started, last - first

    def _now(self) -> float:
        if self.device == "cuda":
            self._torch.cuda.synchronize()
        return time.perf_counter()
