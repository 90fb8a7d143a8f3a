"""What 8-bit weights cost: KL divergence to full precision on GSM8K's text, Qwen2.5-Coder 0.5B.

Run ``pytest -s -m real_trio tests/real/test_int8_kl.py`` to read the figures.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxy_jax.models.decoder import apply
from proxy_jax.trio import ModelSpec, load_trio
from tests.real import models

pytestmark = pytest.mark.real_trio
ROWS, LENGTH = 16, 128


@jax.jit
def compare(full, rounded, weights):
    """Sums over tokens of KL(full || rounded), of equal choices, and their number."""
    p, q = (jax.nn.log_softmax(logits, axis=-1) for logits in (full, rounded))
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = full.argmax(-1) == rounded.argmax(-1)
    return jnp.sum(kl * weights), jnp.sum(same * weights), jnp.sum(weights)


def test_kl_to_full_precision():
    default = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
    data = Path(os.environ.get("PROXY_JAX_GSM8K") or default)
    if not data.exists():
        pytest.skip("no GSM8K; $PROXY_JAX_GSM8K names its test.jsonl")
    spec = ModelSpec(str(models.path("qwen2.5-coder-0.5b-instruct")))
    full = load_trio(spec)
    rounded = load_trio(dataclasses.replace(spec, quantize="int8"))
    run = jax.jit(apply, static_argnums=0)
    totals = np.zeros(3)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    for line in data.read_text(encoding="utf-8").splitlines()[:ROWS]:
        row = json.loads(line)
        ids = full.trio.tokenizer(f"{row['question']}\n{row['answer']}")["input_ids"][:LENGTH]
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        weights = (np.arange(LENGTH) < len(ids))[None].astype(np.float32)
        logits = [
            run(loaded.passes[0].config, loaded.params[0], tokens, positions)[0]
            for loaded in (full, rounded)
        ]
        totals += [float(x) for x in compare(*logits, weights)]
    kl, same = totals[0] / totals[2], totals[1] / totals[2]
    print(f"{int(totals[2])} tokens: KL {kl:.4f} nats a token, same choice {same:.1%}")
    assert 0 < kl < 0.05
    assert same > 0.9
