"""Where arrays lie on the device mesh: one table from logical axis names to mesh axes."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.reading import reading

MESH_AXES = ("data", "fsdp", "tensor")
Axes = tuple[str | None, ...]
_VERSION = re.compile(r"\d+\.\d+")  # AMD's GPUs say "gfx90a" and the like


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axis (or axes) of each logical axis; None replicates.

    The defaults are for decoding: weights stay where they are and only activations move. The
    model width of weights and activations is split over fsdp, so that a product with a weight
    ends in a sum over fsdp and never in gathering the weight. Attention has no model width; there
    fsdp splits the rows, and with them the caches.
    """

    batch: str | tuple[str, ...] | None = "data"
    attention_batch: str | tuple[str, ...] | None = ("data", "fsdp")
    embed: str | tuple[str, ...] | None = "fsdp"
    act_embed: str | tuple[str, ...] | None = "fsdp"
    heads: str | tuple[str, ...] | None = "tensor"
    kv_heads: str | tuple[str, ...] | None = "tensor"
    mlp: str | tuple[str, ...] | None = "tensor"
    vocab: str | tuple[str, ...] | None = "tensor"

    def spec(self, axes: Axes) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Raises:
          InputError: two dimensions of one array fall on the same mesh axis.
        """
        physical = [getattr(self, axis) if axis else None for axis in axes]
        flat = [
            a for entry in physical for a in ((entry,) if isinstance(entry, str) else entry or ())
        ]
        if len(set(flat)) != len(flat):
            raise InputError(f"sharding rules put two dimensions of {axes} on one mesh axis")
        return PartitionSpec(*physical)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that map logical axes to it. Hashable, so static under jit."""

    mesh: Mesh | None = None
    rules: ShardingRules = ShardingRules()

    def sharding(self, axes: Axes) -> NamedSharding:
        """The sharding of an array with these logical axes."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, self.rules.spec(axes))

    @property
    def platform(self) -> str:
        """What the devices are: "cpu", "gpu" or "tpu"."""
        if self.mesh is None:
            return jax.default_backend()
        platform = self.mesh.devices.flat[0].platform
        return "gpu" if platform in ("cuda", "rocm") else platform

    @property
    def compute_capability(self) -> float:
        """The generation of NVIDIA GPUs, 8.0 for Ampere; 0 of other devices."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        found = str(getattr(device, "compute_capability", ""))
        return float(found) if _VERSION.fullmatch(found) else 0.0

    def attention_rows(self, rows: int) -> str:
        """The logical axis of rows in attention: the other layers' if they do not divide."""
        return "batch" if rows % self.split("attention_batch") else "attention_batch"

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Tells the compiler where an activation lies; the identity without a mesh."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def shardings(self, tree_of_axes: Any) -> Any:
        """A tree of shardings from a tree of logical axes."""
        return jax.tree.map(self.sharding, tree_of_axes, is_leaf=is_axes)

    def split(self, axis: str) -> int:
        """How many parts a logical axis is cut into."""
        entry = getattr(self.rules, axis)
        names = (entry,) if isinstance(entry, str) else entry or ()
        return int(np.prod([self.mesh.shape[name] for name in names])) if self.mesh else 1

    def check(self, config: ModelConfig, name: str) -> None:
        """Refuses a model whose dimensions do not divide by the mesh.

        Raises:
          InputError: names the model, the dimension, its size and the mesh axis.
        """
        sizes = {
            "embed": ("model width", config.model_dim),
            "act_embed": ("model width", config.model_dim),
            "heads": ("query heads", config.num_heads),
            "kv_heads": ("kv heads", config.num_kv_heads),
            "mlp": ("mlp width", config.mlp_dim),
            "vocab": ("vocabulary", config.vocab_size),
        }
        for axis, (what, size) in sizes.items():
            self.check_divides(axis, size, f"{name}: {what}")

    def check_divides(self, axis: str, size: int, what: str) -> None:
        """Refuses a size that the mesh does not divide.

        Raises:
          InputError: names the dimension, its size and the mesh axis.
        """
        parts = self.split(axis)
        if size % parts:
            raise InputError(
                f"{what} ({size}) does not divide by the {parts} devices of mesh axis "
                f"{getattr(self.rules, axis)!r}; use a smaller axis, or replicate {axis!r}"
            )


LOCAL = Placement()

# In training the batch is large and weights are gathered for it: both data and fsdp cut the batch.
TRAINING = ShardingRules(batch=("data", "fsdp"), act_embed=None)


def is_axes(leaf: Any) -> bool:
    """Whether a leaf of a tree is a tuple of logical axis names."""
    return isinstance(leaf, tuple) and all(a is None or isinstance(a, str) for a in leaf)


def all_devices() -> list[jax.Device]:
    """Lists the devices of all processes.

    Raises:
      InputError: $JAX_PLATFORMS names none, or one that is not there.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not platforms.replace(",", "").strip():
        raise InputError(f"JAX_PLATFORMS={platforms!r} names no platform")
    with reading(f"JAX_PLATFORMS={platforms!r}", "no such device can be used here"):
        return jax.devices()


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first devices; one axis may be -1 and takes what the others leave.

    Args:
      shape: size of each axis; 1 where absent.
      devices: those to choose from, by default all there are.

    Raises:
      InputError: an unknown axis, more devices than there are, or none of some process's.
    """
    unknown = set(shape) - set(MESH_AXES)
    if unknown:
        raise InputError(f"mesh axis {sorted(unknown)[0]!r} is unknown; axes are {MESH_AXES}")
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    devices = all_devices() if devices is None else devices
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        if rest > 0 and len(devices) % rest == 0:
            sizes[sizes.index(-1)] = len(devices) // rest
    count = math.prod(sizes)
    wanted = " x ".join(f"{axis}={shape.get(axis, 1)}" for axis in MESH_AXES)
    if min(sizes) < 1 or count > len(devices):
        raise InputError(
            f"mesh {wanted} does not fit the {len(devices)} {devices[0].platform} devices"
        )
    if len({device.process_index for device in devices[:count]}) < jax.process_count():
        raise InputError(
            f"mesh {wanted} takes {count} of the {len(devices)} devices, and of some of the "
            f"{jax.process_count()} processes none; one axis may be -1, for all that are left"
        )
    types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=devices[:count])
    except NotImplementedError:  # an axis that is no whole number of the TPU slice's own
        grid = mesh_utils.create_device_mesh(sizes, devices[:count], allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)
    except AssertionError as error:  # on TPU they must be a rectangle
        raise InputError(
            f"mesh {wanted}: {count} of the {len(devices)} devices are no slice by themselves"
        ) from error
