"""TPU slices that are not there: devices to compile for, without one of them.

libtpu holds the compiler; it needs no TPU. A slice is named as `jax.experimental.topologies` does:
"v5e:4x4" is 4 x 4 chips of v5e. (What clouds call v5e-16; a v4-32 is "v4:2x2x4" and a v5p-16
"v5p:2x2x2": there the number counts cores, of which each chip has two that act as one device.)
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from proxy_jax.errors import InputError

# libtpu asks its machine what it is part of; here the answer is nothing.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it would refuse a second process, for a chip's sake
}
_TWO_CORES = ("v4", "v5p")
# GiB of a device that programs may use, as the compiler of libtpu 0.0.42 enforces it.
_HBM = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}


def tpu_devices(name: str) -> list[jax.Device]:
    """The devices of a slice; arrays cannot be put there, but programs be compiled for it.

    Args:
      name: "v5e:4x4", "v6e:2x4", "v4:2x2x4", "v5p:2x2x2", ...

    Raises:
      InputError: libtpu is not installed, or does not know the name.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling for a TPU needs libtpu: pip install 'proxy_jax[tpu]'")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    generation = name.partition(":")[0]
    options: dict[str, Any] = {}
    if generation in _TWO_CORES:
        options["chip_config_name"] = "megacore"
    if name == "v5e:1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
    except Exception as error:  # of the plugin: its types are not public
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"topology {name!r}: {reason}") from error
    return list(found.devices)


def hbm_bytes(device: jax.Device) -> int | None:
    """Memory of a device that programs may use; None if it is not known."""
    gib = _HBM.get(device.device_kind)
    return None if gib is None else int(gib * 2**30)
