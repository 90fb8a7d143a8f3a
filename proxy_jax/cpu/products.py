"""Products of rows and weights whose outputs come first, by kernels for CPUs with AVX-512.

XLA's own read weights of 16 and 8 bits at half the speed of the memory, and multiply few rows at
half that of the processor or less (docs/performance.md). Theirs are the same sums of the same
products: exactly so for integers, in another order for floating-point numbers. Gated layers and
attention are made of them in one piece: their sums do not go through memory.

The kernels, products.cc, are compiled by the machine's C++ compiler when they are first asked for,
and kept in ~/.cache/proxy_jax/kernels. Without the instructions or a compiler XLA multiplies.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proxy_jax.models.activation import Activation, activate

_SOURCE = Path(__file__).with_name("products.cc")
_Entry = str | tuple[str, ...] | None  # of a PartitionSpec
_CACHE = Path("~/.cache/proxy_jax/kernels")
SUMS = {"float32": jnp.float32, "bfloat16": jnp.float32, "int8": jnp.int32}  # dtype, that of sums
FLOATS = ("float32", "bfloat16")  # dtypes of gated layers and adapted weights
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")


@functools.cache
def available() -> bool:
    """Whether this process runs the kernels. Warns if all that is missing is a compiler."""
    if jax.default_backend() != "cpu" or not _has_instructions():
        return False
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in said.splitlines() if "error" in line), said)
        warnings.warn(
            f"the kernels for this CPU could not be compiled, XLA's slower ones are used: {reason}",
            stacklevel=2,
        )
        return False
    kernels = [f"product_{name}" for name in SUMS]
    kernels += [f"{kernel}_{name}" for kernel in ("gated", "attend") for name in FLOATS]
    for name in kernels:
        function = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(_target(name), function, platform="cpu")
    return True


def product(x: jax.Array, weight: jax.Array, *adapter: jax.Array) -> jax.Array:
    """x [R, in] times a weight [out, in] of x's dtype: [R, out] in float32, or in int32 of int8.

    On a mesh each device multiplies what it holds of both; sums over a mesh axis follow if that
    cuts the inputs.

    Args:
      x, weight: the operands.
      adapter: none, or low [R, rank] and b [out, rank] of the same dtype, whose product is added.
    """
    return (_adapted_product if adapter else _product)(x, weight, *adapter)


def gated(
    activation: Activation,
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    *adapters: jax.Array,
) -> jax.Array:
    """act(gate's product) * up's, each step rounded to x's dtype, one of FLOATS: [R, out].

    Args:
      activation: of gate.
      x, gate, up: [R, in] and weights [out, in].
      adapters: none, or as in `product` low and b of gate's, then of up's.
    """
    return _gated(activation, bool(adapters))(x, gate, up, *adapters)


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, scale: float
) -> jax.Array:
    """Grouped-query attention on one device, of one of FLOATS: [B, T, N, H].

    Args:
      q: [B, T, N, H].
      keys, values: [B, K, S, H].
      mask: [B, T, S] bool, True where visible.
      scale: of the scores.
    """
    kernel = jax.ffi.ffi_call(_target(f"attend_{q.dtype.name}"), jax.typeof(q))
    return kernel(q, keys, values, mask, scale=np.float32(scale))


def _multiply(x: jax.Array, weight: jax.Array, *adapter: jax.Array) -> jax.Array:
    name = weight.dtype.name
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), SUMS[name])
    return jax.ffi.ffi_call(_target(f"product_{name}"), shape)(x, weight, *adapter)


def _multiply_parts(summed: _Entry, *operands: jax.Array) -> jax.Array:
    """`_multiply` where each device has a part of the inputs, and all of an adapter's."""
    x, weight, *adapter = operands
    whole = jax.lax.psum(_multiply(x, weight), summed)
    return whole + _multiply(*adapter) if adapter else whole


def _partitioned(
    function: Callable[..., jax.Array],
    of_parts: Callable[..., jax.Array],
    weights: int,
    adapted: bool,
) -> custom_partitioning:
    """A function of x, `weights` weights and perhaps the low and b of each, on every device.

    Args:
      function: where inputs are not cut.
      of_parts: where they are; takes the axes that cut them first.
      weights: how many.
      adapted: whether adapters follow.
    """

    def run(*operands: jax.Array) -> jax.Array:
        return function(*operands)

    def partition(mesh: Mesh, arguments: tuple, result: jax.ShapeDtypeStruct) -> tuple:
        x, weight, *_ = (a.sharding.spec for a in arguments)
        outputs, summed = weight
        # The weights stay where they are: rows that lie along their axes are gathered.
        rows = tuple(axis for axis in _axes(x[0]) if axis not in _axes(outputs) + _axes(summed))
        given = [(rows, summed), *[(outputs, summed)] * weights]
        given += [(rows, None), (outputs, None)] * (weights if adapted else 0)
        made, *taken = (
            NamedSharding(mesh, PartitionSpec(*spec)) for spec in [(rows, outputs), *given]
        )
        on_device = functools.partial(of_parts, summed) if summed else function
        return mesh, on_device, made, tuple(taken)

    pairs = [f"r {rank}, o {rank}" for rank in "abcd"[: weights if adapted else 0]]
    rule = ", ".join(["r i", *["o i"] * weights, *pairs]) + " -> r o"
    made = custom_partitioning(run)
    made.def_partition(partition=partition, sharding_rule=rule)
    return made


_product = _partitioned(_multiply, _multiply_parts, 1, adapted=False)
_adapted_product = _partitioned(_multiply, _multiply_parts, 1, adapted=True)


@functools.cache
def _gated(activation: Activation, adapted: bool) -> custom_partitioning:
    def run(x: jax.Array, *operands: jax.Array) -> jax.Array:
        name, gelu = x.dtype.name, activation == "gelu_tanh"
        shape = jax.ShapeDtypeStruct((x.shape[0], operands[0].shape[0]), x.dtype)
        return jax.ffi.ffi_call(_target(f"gated_{name}"), shape)(x, *operands, gelu=gelu)

    def of_parts(summed: _Entry, x: jax.Array, *operands: jax.Array) -> jax.Array:
        w_gate, w_up, *adapters = operands
        gate = _multiply_parts(summed, x, w_gate, *adapters[:2])
        up = _multiply_parts(summed, x, w_up, *adapters[2:])
        return activate(gate.astype(x.dtype), up.astype(x.dtype), activation)

    return _partitioned(run, of_parts, 2, adapted)


def _axes(entry: _Entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _target(name: str) -> str:
    return f"proxy_jax_{name}"


def _has_instructions() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line[:5] == "flags"), ""
    )
    return set(_INSTRUCTIONS) <= set(flags.split())


def _compiled() -> Path:
    """The kernels as a shared library.

    Raises:
      OSError: there is no compiler.
      CalledProcessError: it failed.
    """
    wanted = os.environ.get("CXX", "c++")
    compiler = shutil.which(wanted)
    if compiler is None:
        raise OSError(f"there is no C++ compiler {wanted!r}")
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-w", "-mfma"]
    flags += [f"-m{name.replace('_', '')}" for name in _INSTRUCTIONS]
    made_from = [_SOURCE.read_text(), compiler, *flags, jaxlib.__version__]
    name = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]
    directory = _CACHE.expanduser()
    library = directory / f"products-{name}.so"
    if not library.exists():
        directory.mkdir(parents=True, exist_ok=True)
        # Under another name first: several processes may be at it.
        with tempfile.TemporaryDirectory(dir=directory) as beside:
            made = Path(beside) / library.name
            command = [compiler, *flags, "-isystem", jax.ffi.include_dir(), str(_SOURCE)]
            subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=True)
            made.replace(library)
    return library
