"""A job of 200 prompts, killed at five random moments, on a real model."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real.test_real_trio import questions  # noqa: F401 (a fixture)

pytestmark = pytest.mark.real_trio
CONFIG = """
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


def test_five_kills_change_nothing(smollm2_path, questions, tmp_path):  # noqa: F811
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(path=str(smollm2_path), prompts=str(questions)))

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "decode.generate", f"--config={config}"]
        return subprocess.Popen([*command, f"--config.output_dir={tmp_path / name}"])

    outputs = [tmp_path / name / "outputs.jsonl" for name in ("whole", "killed")]
    assert start("whole").wait() == 0
    rng, rows = random.Random(0), []
    for _ in range(5):
        process = start("killed")
        try:
            process.wait(rng.uniform(10, 60))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        rows.append(outputs[1].read_bytes().count(b"\n") if outputs[1].exists() else 0)
    assert start("killed").wait() == 0
    assert rows == sorted(rows)
    assert len(outputs[0].read_bytes().splitlines()) == 200
    whole, killed = (Path(output).read_bytes() for output in outputs)
    assert whole == killed
