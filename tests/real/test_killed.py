"""A decoding of 200 prompts and a training, each killed at five random moments, on a real model."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.test_real_trio import questions  # noqa: F401 (a fixture)

pytestmark = pytest.mark.real_trio
DECODING = """
from configs.defaults import decoding


def get_config():
    config = decoding()
    for role in ("base", "expert", "antiexpert"):
        config[role].path = {path!r}
        config[role].dtype = "float32"
    config.expert.template = "chat"
    config.prompts.path = {prompts!r}
    config.prompts.template = "Question: {{question}}\\nAnswer:"
    config.prompts.limit = 200
    config.batch_size = 16
    config.max_new_tokens = 24
    config.save_token_ids = True
    return config
"""


TRAINING = """
from configs.train.defaults import sft


def get_config():
    config = sft()
    config.base = {path!r}
    config.data.path = {rows!r}
    config.data.limit = 36
    config.held_out = 4
    config.max_length = 256
    config.lora.rank = 4
    config.lora.dropout = 0.1
    config.optimizer.learning_rate = 1e-3
    config.batch_size = 2
    config.compute_dtype = "float32"
    config.eval_every = 8
    config.checkpoint_every = 2
    return config
"""


def run_with_kills(program: str, config: Path, progress: Callable[[], int]) -> list[int]:
    """Runs a program to its end once in `whole`, and with five kills in `killed`.

    Returns what had been done at each kill.
    """

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", program, f"--config={config}"]
        return subprocess.Popen([*command, f"--config.output_dir={config.parent / name}"])

    started = time.monotonic()
    assert start("whole").wait() == 0
    seconds = time.monotonic() - started
    rng, done = random.Random(0), []
    for _ in range(5):
        process = start("killed")
        try:
            process.wait(rng.uniform(0.2, 0.6) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done.append(progress())
    assert start("killed").wait() == 0
    return done


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_decoding(smollm2_path, questions, tmp_path):  # noqa: F811
    config = tmp_path / "config.py"
    config.write_text(DECODING.format(path=str(smollm2_path), prompts=str(questions)))
    outputs = [tmp_path / name / "outputs.jsonl" for name in ("whole", "killed")]
    rows = run_with_kills("decode.generate", config, lambda: lines(outputs[1]))
    assert rows == sorted(rows)
    assert lines(outputs[0]) == 200
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_training(smollm2_path, questions, tmp_path):  # noqa: F811
    rows = tmp_path / "rows.jsonl"
    convert = [sys.executable, "-m", "train.convert", "gsm8k", questions, rows]
    subprocess.run(convert, check=True)
    config = tmp_path / "config.py"
    config.write_text(TRAINING.format(path=str(smollm2_path), rows=str(rows)))
    metrics = [tmp_path / name / "metrics.jsonl" for name in ("whole", "killed")]
    steps = run_with_kills("train.sft", config, lambda: lines(metrics[1]))
    print("records at each kill:", steps)
    assert max(steps) > 0
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        whole, killed = (tmp_path / name / "expert" / file for name in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), file
