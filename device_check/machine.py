"""Which machine this is, and what it reads and multiplies at best."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import time

import jax
import jax.numpy as jnp

from decode import timing
from device_check.figures import Record
from device_check.sizes import Sizes

# Modules that some part of proxy_jax imports: what they are called where they are installed from,
# and what cannot be run without them.
MODULES = {
    "jax": ("jax", "anything"),
    "flax": ("flax", "anything"),
    "optax": ("optax", "training"),
    "safetensors": ("safetensors", "anything"),
    "tensorstore": ("tensorstore", "anything"),
    "tqdm": ("tqdm", "anything"),
    "jinja2": ("jinja2", "chat templates"),
    "transformers": ("transformers", "tokenizers, and the torch loop here"),
    "torch": ("torch", "the torch loop here"),
    "scipy": ("scipy", "decode.evaluate"),
    "matplotlib": ("matplotlib", "plots"),
    "ml_collections": ("ml-collections", "programs with --config"),
    "absl": ("absl-py", "programs with --config"),
    "orbax": ("orbax-checkpoint", "train.sft"),
    "grain": ("grain", "train.sft"),
    "tensorboardX": ("tensorboardX", "train.sft"),
    "gguf": ("gguf", "GGUF files"),
}
_SIZE = 8192  # of the square product that is timed on accelerators


def missing() -> dict[str, str]:
    """Distributions that are not installed, and what needs them."""
    return {
        distribution: needs
        for module, (distribution, needs) in MODULES.items()
        if importlib.util.find_spec(module) is None
    }


def run(sizes: Sizes, record: Record) -> None:
    """Records the device, the versions, and two ceilings."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    versions = {}
    for distribution, _ in MODULES.values():
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    record(
        {
            "device": device.device_kind,
            "devices": jax.device_count(),
            "platform": device.platform,
            "memory": stats.get("bytes_limit"),
            "python": platform.python_version(),
            "versions": versions,
            "missing": missing(),
        }
    )
    record({"bandwidth": timing.bandwidth()})
    record({"flops": product_flops(_SIZE if device.platform != "cpu" else 1024)})


def product_flops(size: int) -> float:
    """Operations a second of a square product in bfloat16, the best of five."""
    x, y = (
        jax.random.normal(key, (size, size), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0))
    )
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    multiply(x, y).block_until_ready()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready([multiply(x, y) for _ in range(4)])
        seconds.append((time.perf_counter() - started) / 4)
    return 2 * size**3 / min(seconds)
