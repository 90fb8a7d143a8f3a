"""Products of rows and a weight whose outputs come first, by kernels for CPUs with AVX-512.

XLA's own read weights of 16 and 8 bits at half the speed of the memory, and multiply few rows at
half that of the processor or less (docs/performance.md). Theirs are the same sums of the same
products: exactly so for integers, in another order for floating-point numbers.

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
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SOURCE = Path(__file__).with_name("products.cc")
_CACHE = Path("~/.cache/proxy_jax/kernels")
SUMS = {"float32": jnp.float32, "bfloat16": jnp.float32, "int8": jnp.int32}  # dtype, that of sums
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
    for name in SUMS:
        function = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(_target(name), function, platform="cpu")
    return True


@custom_partitioning
def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [R, in] times a weight [out, in] of x's dtype: [R, out] in float32, or in int32 of int8.

    On a mesh each device multiplies what it holds of both; sums over a mesh axis follow if that
    cuts the inputs.
    """
    name = weight.dtype.name
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), SUMS[name])
    return jax.ffi.ffi_call(_target(name), shape)(x, weight)


def _partition(mesh: Mesh, arguments: tuple, result: jax.ShapeDtypeStruct) -> tuple:
    x, weight = (a.sharding.spec for a in arguments)
    outputs, summed = weight
    # The weight stays where it is: rows that lie along its axes are gathered.
    rows = tuple(axis for axis in _axes(x[0]) if axis not in _axes(outputs) + _axes(summed))

    def of_device(x: jax.Array, weight: jax.Array) -> jax.Array:
        part = product.fun(x, weight)
        return jax.lax.psum(part, summed) if summed else part

    specs = (rows, outputs), (rows, summed), (outputs, summed)
    made, *given = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs)
    return mesh, of_device, made, tuple(given)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


product.def_partition(partition=_partition, sharding_rule="r i, o i -> r o")


def _target(name: str) -> str:
    return f"proxy_jax_product_{name}"


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
