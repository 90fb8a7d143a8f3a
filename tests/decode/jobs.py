"""Configs of small jobs over the llama trio, run in this process or in one of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.defaults import decoding
from tests.programs import environment
from tests.trios import PROMPTS, ROLES, TinyTrio

ROOT = Path(__file__).parents[2]


def write_prompts(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    rows = [{"prompt": prompt} for prompt in PROMPTS] if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(trio: TinyTrio, directory: Path, **fields: Any) -> ConfigDict:
    """A job in a directory; fields by their dotted name with "__" for the dot."""
    config = decoding()
    for role in ROLES:
        config[role].path = str(trio.paths[role])
        config[role].dtype = "float32"
        config[role].template = trio.templates.get(role, "raw")
    config.prompts.path = str(directory / "prompts.jsonl")
    config.output_dir = str(directory / "out")
    config.batch_size, config.chunk_steps, config.max_new_tokens = 4, 4, 12
    for name, value in fields.items():
        *parents, last = name.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    if not Path(config.prompts.path).exists():
        write_prompts(Path(config.prompts.path))
    return config


def outputs(config: ConfigDict) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "outputs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def start(
    config: ConfigDict, program: str = "generate", *more: str, before: str = ""
) -> subprocess.Popen:
    """`python -m decode.PROGRAM` on a config, as a user starts it from a shell.

    `before` is run in the shell first.
    """
    file = Path(config.output_dir).parent / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config.to_dict()!r}).lock()\n"
    )
    command = [sys.executable, "-m", f"decode.{program}", f"--config={file}", *more]
    return subprocess.Popen(
        ["sh", "-c", f'{before}exec "$@"', "sh", *command],
        cwd=ROOT,
        env=environment(JAX_DISABLE_MOST_OPTIMIZATIONS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends_in_one_line(process: subprocess.Popen) -> str:
    """Waits for a program that fails; its status is 2, its last line says why, nothing else."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    lines = errors.strip().split("\n")
    assert lines[-1].startswith("error: "), errors
    assert not any(line.startswith("error: ") for line in lines[:-1])
    return lines[-1].removeprefix("error: ")
