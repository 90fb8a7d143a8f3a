"""Fused attention: splash against the plain form, step by step on CPU; the CPU's kernel; cuDNN as
far as lowering."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from proxy_jax.cpu import products
from proxy_jax.models import attention
from proxy_jax.models.config import ModelConfig, Rope
from proxy_jax.models.decoder import abstract_params, hidden_states, stack_layers
from proxy_jax.sharding import LOCAL, Placement, ShardingRules, make_mesh

B, T, N, K, H = 4, 256, 4, 2, 64


def config(**fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 64,
        "num_layers": 2,
        "model_dim": 32,
        "mlp_dim": 48,
        "num_heads": N,
        "num_kv_heads": K,
        "head_dim": H,
        "max_positions": T,
        "norm_eps": 1e-5,
        "ropes": (Rope(),),
        "layer_ropes": (0, 0),
        "layer_windows": (None, None),
        "query_scale": 0.2,
    }
    return ModelConfig(**(sizes | fields))


def inputs() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, K, T, H)) for key in keys[1:3])
    return q, k, v, jax.random.normal(keys[3], q.shape)


def in_numpy(q, k, v, window, cap, segments):
    """Query by query, over the keys that it sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        first = 0 if window is None else max(0, t - window + 1)
        seen = [
            s for s in range(first, t + 1) if segments is None or segments[b][s] == segments[b][t]
        ]
        scores = k[b, n // (N // K), seen] @ q[b, t, n] * 0.2
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, n // (N // K), seen]
    return out


@pytest.mark.parametrize(
    ("window", "cap", "packed", "mesh"),
    [
        (None, None, False, None),
        (None, 5.0, True, {"data": 2, "fsdp": 2, "tensor": 2}),
        (70, None, True, None),
    ],
)
def test_splash(window, cap, packed, mesh):
    model = config(layer_windows=(window, window), attention_softcap=cap)
    place = Placement(make_mesh(mesh)) if mesh else LOCAL
    segments = np.sort(np.arange(B * T).reshape(B, T) % 3, axis=1) if packed else None
    q, k, v, weights = inputs()

    def run(q, k, v):
        own = None if segments is None else jnp.asarray(segments, jnp.int32)
        return attention.splash_attend(q, k, v, own, model, place, interpret=True)

    out = jax.jit(run)(q, k, v)
    expected = in_numpy(q, k, v, window, cap, segments)
    np.testing.assert_allclose(out, expected, atol=2e-5)

    mask = visible(window, segments)

    def plain(q, k, v):
        return attention.attend(q, k, v, mask, model)

    for found, wanted in zip(*gradients((run, plain), q, k, v, weights), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-4)


def visible(window, segments):
    """The mask, [1 or B, T, T]."""
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    mask = (distance >= 0) & (distance < (window or T))
    same = True if segments is None else segments[:, :, None] == segments[:, None]
    return jnp.asarray(mask[None] & same)


def gradients(functions, q, k, v, weights):
    """Of each function of q, k and v, summed with these weights."""
    return [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) * weights), argnums=(0, 1, 2)))(q, k, v)
        for f in functions
    ]


@pytest.mark.skipif(not products.available(), reason="this machine has no kernels")
@pytest.mark.parametrize(("window", "packed"), [(None, False), (70, True)])
def test_on_cpu(window, packed):
    model = config(layer_windows=(window, window))
    assert attention.kernel(model, LOCAL, T, jnp.dtype("float32")) == "cpu"
    segments = np.sort(np.arange(B * T).reshape(B, T) % 3, axis=1) if packed else None
    q, k, v, weights = inputs()
    mask = visible(window, segments)

    def run(q, k, v):
        return attention.attend_fresh(q, k, v, mask, None, model, LOCAL)

    def plain(q, k, v):
        return attention.attend(q, k, v, mask, model)

    out = jax.jit(run)(q, k, v)
    np.testing.assert_allclose(out, in_numpy(q, k, v, window, None, segments), atol=2e-6)
    roles = jax.jit(jax.vmap(run, (0, 0, None)))(jnp.stack([q, 2 * q]), jnp.stack([k, v]), v)
    np.testing.assert_array_equal(roles[0], out)
    np.testing.assert_array_equal(roles[1], jax.jit(run)(2 * q, v, v))
    # Where it is differentiated, it is the plain form.
    for found, wanted in zip(*gradients((run, plain), q, k, v, weights), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


class OnTPU(Placement):
    """A placement that says it is on a TPU."""

    platform = "tpu"


class OnGPU(Placement):
    """A placement that says it is on a GPU."""

    platform = "gpu"
    compute_capability = 8.0


class OnOldGPU(OnGPU):
    """Of a generation before cuDNN's fused attention."""

    compute_capability = 7.5


@pytest.mark.parametrize(
    ("place", "fields", "length", "dtype", "chosen"),
    [
        (OnTPU(), {}, 256, "bfloat16", "splash"),
        (OnTPU(), {"attention_softcap": 50.0, "layer_windows": (9, 9)}, 128, "float16", "splash"),
        (OnTPU(), {}, 256, "float32", None),
        (OnTPU(), {}, 200, "bfloat16", None),
        (OnTPU(), {"head_dim": 48}, 256, "bfloat16", None),
        (OnTPU(), {"layer_windows": (None, 9)}, 256, "bfloat16", None),
        (OnGPU(), {"head_dim": 48}, 30, "bfloat16", "cudnn"),
        (OnOldGPU(), {"head_dim": 48}, 30, "bfloat16", None),
        (OnGPU(), {}, 31, "bfloat16", None),
        (OnGPU(), {}, 30, "float32", None),
        (OnGPU(), {"head_dim": 256}, 30, "bfloat16", None),
        (OnGPU(), {"attention_softcap": 50.0}, 30, "bfloat16", None),
        (LOCAL, {}, 256, "bfloat16", "cpu"),
        (LOCAL, {"layer_windows": (None, 9)}, 31, "float32", "cpu"),
        (LOCAL, {}, 1, "bfloat16", None),
        (LOCAL, {}, 256, "float16", None),
        (LOCAL, {"attention_softcap": 50.0}, 256, "bfloat16", None),
        (Placement(make_mesh({"data": 2})), {}, 256, "bfloat16", None),
    ],
)
def test_when_a_kernel_is_taken(place, fields, length, dtype, chosen, monkeypatch):
    monkeypatch.setattr(products, "available", lambda: True)
    assert attention.kernel(config(**fields), place, length, jnp.dtype(dtype)) == chosen


def test_kv_heads_that_stay_whole_are_plain():
    place = OnTPU(make_mesh({"tensor": 4}), ShardingRules(kv_heads=None))
    assert attention.kernel(config(), place, 256, jnp.dtype("bfloat16")) is None


@pytest.mark.parametrize("packed", [False, True])
def test_the_model_calls_cudnn(monkeypatch, packed):
    """Lowered for a GPU that is not there, forward and backward."""
    fake = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", fake)
    model = config()
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
        jax.eval_shape(stack_layers, abstract_params(model)),
    )
    tokens = jax.ShapeDtypeStruct((B, 64), jnp.int32)

    def run(params, tokens):
        x, _ = hidden_states(
            model, params, tokens, tokens, place=OnGPU(), segments=tokens if packed else None
        )
        return jnp.sum(x.astype(jnp.float32))

    lowered = jax.jit(jax.grad(run)).trace(params, tokens).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "__cudnn$fmhaSoftmax" in text or "__cudnn$fmhaScaleBiasSoftmax" in text
    assert "Backward" in text
    plain = dataclasses.replace(model, attention_softcap=50.0)
    lowered = (
        jax.jit(lambda p, t: hidden_states(plain, p, t, t, place=OnGPU())[0])
        .trace(params, tokens)
        .lower(lowering_platforms=("cuda",))
    )
    assert "__cudnn" not in lowered.as_text()
