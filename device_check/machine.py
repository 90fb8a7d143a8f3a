"""Which machine this is, and what it reads and multiplies at best."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

import jax

from decode import timing
from device_check.figures import Record
from device_check.sizes import Sizes
from train.flops import product_flops

# Distributions that some part of proxy_jax imports, and what cannot be run without them.
NEEDED_BY = {
    "jax": "anything",
    "flax": "anything",
    "optax": "training",
    "safetensors": "anything",
    "tensorstore": "anything",
    "tqdm": "anything",
    "jinja2": "chat templates",
    "transformers": "tokenizers, and the torch loop here",
    "torch": "the torch loop here",
    "scipy": "decode.evaluate",
    "matplotlib": "plots",
    "ml-collections": "programs with --config",
    "absl-py": "programs with --config",
    "orbax-checkpoint": "train.sft",
    "grain": "train.sft",
    "tensorboardX": "train.sft",
    "gguf": "GGUF files",
}
_SIZE = 8192  # of the square product that is timed on accelerators


def installed() -> dict[str, str]:
    """Versions of the distributions that are here, whether or not they are imported."""
    versions = {}
    for distribution in NEEDED_BY:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[distribution] = importlib.metadata.version(distribution)
    return versions


def run(sizes: Sizes, record: Record) -> None:
    """Records the device, the versions, and two ceilings."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    versions = installed()
    record(
        {
            "device": device.device_kind,
            "devices": jax.device_count(),
            "platform": device.platform,
            "memory": stats.get("bytes_limit"),
            "python": platform.python_version(),
            "versions": versions,
            "missing": {d: why for d, why in NEEDED_BY.items() if d not in versions},
        }
    )
    record({"bandwidth": timing.bandwidth()})
    record({"flops": product_flops("bfloat16", _SIZE if device.platform != "cpu" else 1024)})
