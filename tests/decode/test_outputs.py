"""The output directory: who may write it, and what is kept."""

import errno
import json
import os
import subprocess
import sys

import pytest

from decode.outputs import OutputFile
from proxy_jax.errors import InputError
from tests.decode.jobs import ROOT

CONFIG, INPUTS = {"alpha": 1.0, "stop": ("a",)}, {"prompts": "digest"}
PROMPTS = [f"prompt {row}" for row in range(8)]


def records(*rows):
    return [{"row": row, "prompt": PROMPTS[row], "text": "é\n\u2028"} for row in rows]


def rows(directory):
    lines = (directory / "outputs.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line)["row"] for line in lines]


def test_rows_end_in_the_order_of_the_prompts(tmp_path):
    output = OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS)
    output.append(records(2, 0))
    assert rows(tmp_path) == [2, 0]  # on disk at once
    output.append(records(1))
    output.finish({"new_tokens": 5})
    assert rows(tmp_path) == [0, 1, 2]
    assert output.done == {0, 1, 2}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["runs"][0]["new_tokens"] == 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "outputs.jsonl"]


def test_half_written_line_is_dropped(tmp_path):
    output = OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS)
    output.append(records(0, 1))
    del output
    file = tmp_path / "outputs.jsonl"
    whole = file.read_bytes()
    for length in range(1, len(whole) + 1):
        file.write_bytes(whole[:length])
        output = OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS)
        assert output.done == set(range(whole[:length].count(b"\n")))
        output.append(records(7))
        assert rows(tmp_path) == [*sorted(output.done - {7}), 7]
        del output


def test_second_process_is_locked_out(tmp_path):
    output = OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS)
    output.append(records(0))
    code = (
        "import pathlib, sys\nfrom decode.outputs import OutputFile\n"
        f"OutputFile(pathlib.Path(sys.argv[1]), {CONFIG}, {INPUTS}, {PROMPTS})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "outputs.jsonl: another process is writing it" in second.stderr
    assert rows(tmp_path) == [0]
    assert OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS, write=False).done == {0}


def test_output_of_another_job(tmp_path):
    OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS).append(records(0))
    for config, inputs, message in (
        (CONFIG | {"alpha": 2.0}, INPUTS, "alpha: 1.0, now 2.0"),
        (CONFIG | {"stop": ("b",)}, INPUTS, r"stop: \['a'\], now \['b'\]"),
        (CONFIG | {"new": 1}, INPUTS, "new: None, now 1"),
        (CONFIG, {"prompts": "other"}, "prompts: 'digest', now 'other'"),
    ):
        with pytest.raises(InputError, match=message):
            OutputFile(tmp_path, config, inputs, PROMPTS)
    assert rows(tmp_path) == [0]
    free = {"chunk_steps": 3, "output_dir": "elsewhere", "overwrite": False, "context": 7}
    assert OutputFile(tmp_path, CONFIG | free, INPUTS, PROMPTS).done == {0}
    assert OutputFile(tmp_path, {"alpha": 3.0, "overwrite": True}, INPUTS, PROMPTS).done == set()
    assert rows(tmp_path) == []


def test_files_of_nobody(tmp_path):
    file = tmp_path / "outputs.jsonl"
    good = json.dumps(records(0)[0]) + "\n"
    file.write_text(good)
    with pytest.raises(InputError, match=r"exists, but no manifest.json says what made it"):
        OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS)
    file.write_text("")
    OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS).append(records(0))
    for line, message in (
        ("text", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a row of this job"),
        ('{"id": 3}', "row is missing"),
        (records_line(row=True), "row must be an integer, not True"),
        (records_line(row=-1), "row must be between 0 and 7, not -1"),
        (records_line(row=8), "row must be between 0 and 7, not 8"),
        (records_line(row=0, prompt=PROMPTS[0]), "row 0 is there twice"),
        (records_line(row=1, prompt="another"), "row 1 has another prompt in this job"),
        (records_line(row=1, prompt=None), "row 1 has another prompt in this job"),
        (records_line(row=1, text=5), "text must be a string, not int"),
    ):
        file.write_text(good + line + "\n")
        with pytest.raises(InputError, match=rf"outputs.jsonl:2: {message}"):
            OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS)
        assert file.read_text() == good + line + "\n"
    for content in ('{"config": ', "[]", '{"config": [], "inputs": {}, "runs": []}', "\0", '"'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=r"manifest.json: not "):
            OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS)


def records_line(**fields):
    return json.dumps({"row": 1, "prompt": PROMPTS[1], "text": "", **fields})


def test_what_json_does_not_have_is_not_written(tmp_path):
    output = OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS)
    output.append(records(0))
    with pytest.raises(InputError, match=r"outputs.jsonl: cannot write"):
        output.append([records(1)[0] | {"id": float("nan")}])
    assert rows(tmp_path) == [0]


def test_models_are_told_apart_by_their_files(tmp_path):
    """Not by their paths; and what is read on the day of the run only where rows are written."""
    config = CONFIG | {"base": {"path": "a", "dtype": "float32"}}
    inputs = INPUTS | {"base": {"model": "1", "adapter": "", "checkpoint": None}}
    OutputFile(tmp_path, config, inputs | {"rendered": "x"}, PROMPTS).append(records(0))
    moved = CONFIG | {"base": {"path": "b", "dtype": "float32"}}
    assert OutputFile(tmp_path, moved, inputs, PROMPTS, write=False).done == {0}
    other = INPUTS | {"base": {"model": "2", "adapter": "", "checkpoint": None}}
    for write in (True, False):
        with pytest.raises(InputError, match=r"base.model: '1', now '2'"):
            OutputFile(tmp_path, moved, other, PROMPTS, write=write)
    with pytest.raises(InputError, match=r"rendered: 'x', now 'y'"):
        OutputFile(tmp_path, moved, inputs | {"rendered": "y"}, PROMPTS)


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out: Not a directory"):
        OutputFile(tmp_path / "file" / "out", CONFIG, INPUTS, PROMPTS)


def test_full_disk_when_the_rows_are_sorted(tmp_path, monkeypatch):
    output = OutputFile(tmp_path, CONFIG, INPUTS, PROMPTS)
    output.append(records(1, 0))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match=r"manifest.json: cannot write \(No space left on device\)"
    ):
        output.finish({})
    assert rows(tmp_path) == [1, 0]
