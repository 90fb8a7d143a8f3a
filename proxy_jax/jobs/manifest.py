"""manifest.json: which config and inputs an output directory belongs to, and what made it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from proxy_jax.errors import InputError
from proxy_jax.jobs import files
from proxy_jax.reading import read_json

FILE = "manifest.json"
_PACKAGES = ("proxy_jax", "jax", "jaxlib", "flax", "transformers", "numpy")


def new(config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """The content of a new manifest.

    Args:
      config: resolved.
      inputs: what else the result depends on, by name: digests, mostly.
    """
    # Through JSON: tuples become lists, as they are when read back.
    return json.loads(json.dumps({"config": config, "inputs": inputs, "runs": []}))


def read(directory: Path) -> dict[str, Any] | None:
    """The content of a directory's manifest; None if it has none.

    Raises:
      InputError: the file is something else.
    """
    path = directory / FILE
    if not path.exists():
        return None
    content = read_json(path)
    kinds = {"config": dict, "inputs": dict, "runs": list}
    if not all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
        raise InputError(f"{path}: not a manifest of a job")
    return content


def changed(old: dict[str, Any], now: dict[str, Any], free: Collection[str]) -> str | None:
    """The first field in which two manifests' configs or inputs differ: "alpha: 1.0, now 0.5".

    Args:
      old, now: contents.
      free: fields that may differ, as "field" or "part.field".
    """
    return _difference(old["config"], now["config"], free) or _difference(
        old["inputs"], now["inputs"], free
    )


def write(directory: Path, content: dict[str, Any]) -> None:
    """Replaces a directory's manifest."""
    files.replace(directory / FILE, json.dumps(content, indent=2).encode() + b"\n")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def this_run() -> dict[str, Any]:
    """Who made it: versions, commit, command, device."""
    device = jax.devices()[0]
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(sys.orig_argv),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
    }


def _commit() -> str | None:
    """The checkout's commit, "+changes" if files differ; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # Installed below somebody's repository, it is not part of that.
        known = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(known, capture_output=True, check=True)
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def _difference(
    old: dict[str, Any], now: dict[str, Any], free: Collection[str], prefix: str = ""
) -> str | None:
    for key in sorted({*old, *now}):
        before, after = old.get(key), now.get(key)
        if before == after or prefix + key in free:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            if inner := _difference(before, after, free, f"{prefix}{key}."):
                return inner
            continue
        return f"{prefix}{key}: {_brief(before)}, now {_brief(after)}"
    return None


def _brief(value: Any) -> str:
    """A value as a line quotes it; of a digest the beginning."""
    digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"{value[:12]}..." if digest else repr(value)
