"""How a program starts and fails: one line, status 2, no traceback."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs.defaults import decoding
from configs.train.defaults import sft
from proxy_jax.errors import InputError
from proxy_jax.jobs import launch

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import time

from proxy_jax.jobs import launch
from configs.defaults import decoding
from proxy_jax.errors import InputError


def main(config):
    if config.alpha > 5:
        raise InputError("alpha is\\n  too large")
    if config.alpha < 0:
        raise ZeroDivisionError
    if config.alpha == 3:
        raise KeyboardInterrupt
    if config.alpha == 4:
        print("started", flush=True)
        while True:
            try:
                time.sleep(0.1)
            except KeyboardInterrupt:
                pass  # as native callbacks lose it
    print("alpha", config.alpha, "stop", config.stop, "top_p", config.sampling.top_p)


launch._PATIENCE = 1
launch.run(main, lambda _: decoding())
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
    (directory / "exits.py").write_text("raise SystemExit(0)\n")
    (directory / "other.py").write_text("from configs.train.defaults import sft as get_config\n")
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
        "config that exits": start(directory, f"--config={directory}/exits.py"),
        "other program": start(directory, f"--config={directory}/other.py"),
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
        ("config that exits", "SystemExit: 0"),
        ("other program", "there is no field alpha; is it another program's config?"),
    ],
)
def test_one_line(finished, case, words):
    status, out, errors = finished[case]
    assert (status, out) == (2, ""), errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    assert words in errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("beta"), "there is no field beta;"),
        (lambda c: c["sampling"].pop("top_p"), "there is no field sampling.top_p;"),
        (lambda c: c.update(gamma=1), "field gamma is unknown to this program"),
        (lambda c: c.update(seed=None), "seed must be of type int, not None"),
        (lambda c: c.update(seed=True), "seed must be of type int, not True"),
        (lambda c: c.update(seed=1.0), "seed must be of type int, not 1.0"),
        (lambda c: c.update(alpha="1"), "alpha must be of type float, not '1'"),
        (lambda c: c.update(stop="ab"), "stop must be of type tuple, not 'ab'"),
        (lambda c: c.update(trace=1), "trace must be of type bool, not 1"),
        (lambda c: c.update(sampling=1), "sampling. must be a ConfigDict"),
        (lambda c: c["sampling"].update(top_k="x"), "sampling.top_k must be of type int, not 'x'"),
    ],
)
def test_configs_that_are_not_the_program_s(change, words):
    fields = decoding().to_dict()
    change(fields)
    with pytest.raises(InputError, match=words):
        launch.check_fields(ConfigDict(fields), decoding())


def test_configs_that_are_the_program_s():
    fields = decoding().to_dict() | {"alpha": 2, "stop": ["a"]}
    launch.check_fields(ConfigDict(fields), decoding())
    config = sft().unlock()
    config.architecture = ConfigDict({"whatever": 1})  # its fields are the model's
    launch.check_fields(config, sft())
    with pytest.raises(InputError, match="must be a ConfigDict"):
        launch.check_fields(5, decoding())


def test_interrupted(finished):
    assert finished["interrupted"] == (130, "", "interrupted\n")


def test_bugs_keep_their_traceback(finished):
    status, _, errors = finished["bug"]
    assert status == 1
    assert "Traceback" in errors
    assert "ZeroDivisionError" in errors


def test_an_interrupt_that_is_lost_ends_the_program_all_the_same(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config.py").write_text("from configs.defaults import decoding as get_config\n")
    process = start(tmp_path, f"--config={tmp_path}/config.py", "--config.alpha=4")
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.communicate()


@pytest.mark.parametrize("package", ["decode", "train"])
def test_an_interrupt_while_it_imports(tmp_path, package):
    """A module that stands in for JAX, and takes as long as one likes."""
    (tmp_path / "jax.py").write_text("print('importing', flush=True)\nimport time; time.sleep(60)")
    (tmp_path / "ml_collections.py").write_text((tmp_path / "jax.py").read_text())
    program = {"decode": "decode.generate", "train": "train.sft"}[package]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", program],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have it ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode in (130, -signal.SIGINT)


def test_outputs_that_nobody_takes(tmp_path):
    """head(1) has enough after a line; a full disk takes none."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config.py").write_text("from configs.defaults import decoding as get_config\n")
    command = [sys.executable, str(tmp_path / "program.py"), f"--config={tmp_path}/config.py"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (run.returncode, run.stderr) == (
        1, "error: standard output: No space left on device\n"
    )  # fmt: skip
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (1, "")
