"""How a program starts and fails: one line, status 2, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys

import launch
from proxy_jax.errors import InputError


def main(config):
    if config.alpha > 5:
        raise InputError("alpha is\\n  too large")
    if config.alpha < 0:
        raise ZeroDivisionError
    if config.alpha == 3:
        raise KeyboardInterrupt
    print("alpha", config.alpha, "stop", config.stop, "top_p", config.sampling.top_p)


launch.run(main)
"""


def start(directory, *arguments):
    return subprocess.Popen(
        [sys.executable, str(directory / "program.py"), *arguments],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of the program, side by side."""
    directory = tmp_path_factory.mktemp("launch")
    (directory / "program.py").write_text(PROGRAM)
    config, broken = (f"--config={directory}/{name}.py" for name in ("config", "broken"))
    (directory / "config.py").write_text("from configs.defaults import decoding as get_config\n")
    (directory / "broken.py").write_text("def get_config(:\n")
    processes = {
        "good": start(
            directory, config, "--config.alpha=0.5", "--config.stop=('a', 'b')",
            "--config.sampling.top_p=0.9",
        ),
        "bad value": start(directory, config, "--config.alpha=6"),
        "interrupted": start(directory, config, "--config.alpha=3"),
        "bug": start(directory, config, "--config.alpha=-1"),
        "no config": start(directory),
        "absent config": start(directory, f"--config={directory}/absent.py"),
        "unknown key": start(directory, config, "--config.alhpa=1"),
        "unknown part": start(directory, config, "--config.sampler.top_p=1"),
        "wrong type": start(directory, config, "--config.alpha=much"),
        "unknown flag": start(directory, config, "--alpha=1"),
        "stray argument": start(directory, config, "alpha=1"),
        "broken config": start(directory, broken),
    }  # fmt: skip
    ends = {}
    for name, process in processes.items():
        out, errors = process.communicate(timeout=120)
        ends[name] = (process.returncode, out, errors)
    return ends


def test_settings_on_the_command_line(finished):
    status, out, errors = finished["good"]
    assert status == 0, errors
    assert out == "alpha 0.5 stop ('a', 'b') top_p 0.9\n"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("bad value", "alpha is too large"),
        ("no config", "--config=FILE is missing"),
        ("absent config", "absent.py"),
        ("unknown key", "alhpa"),
        ("unknown part", "there is no field 'sampler'"),
        ("wrong type", "much"),
        ("unknown flag", "Unknown command line flag 'alpha'"),
        ("stray argument", "unexpected argument 'alpha=1'"),
        ("broken config", "broken.py"),
    ],
)
def test_one_line(finished, case, words):
    status, out, errors = finished[case]
    assert (status, out) == (2, ""), errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    assert words in errors


def test_interrupted(finished):
    assert finished["interrupted"] == (130, "", "interrupted\n")


def test_bugs_keep_their_traceback(finished):
    status, _, errors = finished["bug"]
    assert status == 1
    assert "Traceback" in errors
    assert "ZeroDivisionError" in errors
