"""SmolLM2-135M from its GGUF file, against transformers' own loading of the same file."""

import jax
import numpy as np
import pytest

from proxy_jax.models.decoder import apply
from proxy_jax.trio import ModelSpec, load_trio

pytestmark = pytest.mark.real
TEXT = "The capital of France is Paris. 12 * 12 = 144; def add(a, b):\n    return a + b\n"


def test_logits_equal_transformers(smollm2_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    loaded = load_trio(ModelSpec(str(smollm2_path)))
    tokens = np.asarray([loaded.trio.tokenizer(TEXT)["input_ids"]], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    [one], [params] = loaded.passes, loaded.params
    ours, _ = jax.jit(apply, static_argnums=0)(one.config, params, tokens, positions)

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-3
