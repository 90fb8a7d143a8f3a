"""generate and check from config to files: what is written, and what a killed job leaves."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from decode import check, generate, job, outputs
from proxy_jax.errors import InputError
from tests.decode import jobs
from tests.trios import PROMPTS, STEPS


def test_outputs_and_manifest(llama, expected, tmp_path, capsys):
    rows = [{"id": f"q{i}", "question": prompt} for i, prompt in enumerate(PROMPTS)]
    jobs.write_prompts(tmp_path / "prompts.jsonl", rows)
    config = jobs.config_of(
        llama, tmp_path, prompts__field="question", prompts__id_field="id", save_token_ids=True
    )
    generate.main(config)
    assert "8 rows in" in capsys.readouterr().out
    decode = llama.tokenizers["base"].decode
    assert jobs.outputs(config) == [
        {
            "row": row,
            "line": row + 1,
            "sample": 0,
            "id": f"q{row}",
            "prompt": prompt,
            "text": decode(tokens, skip_special_tokens=True),
            "finish_reason": "length",
            "new_tokens": STEPS,
            "prompt_tokens": {role: len(ids) for role, ids in llama.ids(prompt).items()},
            "token_ids": tokens,
        }
        for row, (prompt, tokens) in enumerate(zip(PROMPTS, expected, strict=True))
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"] == json.loads(json.dumps(config.to_dict()))
    (run,) = manifest["runs"]
    assert run["versions"]["jax"]
    assert "8 x cpu" in run["device"]
    assert (run["rows"], run["rows_resumed"], run["new_tokens"]) == (8, 0, 8 * STEPS)


def test_alpha_of_each_row_and_template(llama, tmp_path):
    alphas = [0.0, 1.5, [[0, 1.0], [4, 0.0]]]
    rows = [
        {"a": prompt[:3], "b": prompt[3:], "alpha": alpha}
        for prompt, alpha in zip(PROMPTS, alphas, strict=False)
    ]
    jobs.write_prompts(tmp_path / "prompts.jsonl", rows)
    config = jobs.config_of(
        llama, tmp_path, prompts__template="{a}{b}", alpha_field="alpha", save_token_ids=True
    )
    generate.main(config)
    values = (0.0, 1.5, lambda step: 1.0 if step < 4 else 0.0)
    assert [row["token_ids"] for row in jobs.outputs(config)] == [
        llama.greedy(llama.ids(prompt), STEPS, llama.shifted(value))
        for prompt, value in zip(PROMPTS, values, strict=False)
    ]


@pytest.mark.parametrize("method", ["base", "expert"])
def test_one_model_alone(llama, tmp_path, method):
    config = jobs.config_of(llama, tmp_path, method=method, save_token_ids=True, prompts__limit=3)
    generate.main(config)
    assert [row["token_ids"] for row in jobs.outputs(config)] == [
        _alone(llama, method, prompt) for prompt in PROMPTS[:3]
    ]


def _alone(trio, role, prompt):
    ids = trio.ids(prompt)[role]
    new: list[int] = []
    while len(new) < STEPS:
        scores = trio.scores(role, [*ids, *new])[: len(trio.tokenizers[role])]
        new.append(int(scores.argmax()))
    return new


SAMPLED = {"sampling__temperature": 1.0, "samples": 20, "seed": 3, "chunk_steps": 1}


@pytest.fixture(scope="module")
def uninterrupted(llama, tmp_path_factory):
    """The outputs of a job of 160 rows, made in a process of its own."""
    config = jobs.config_of(llama, tmp_path_factory.mktemp("whole"), **SAMPLED)
    process = jobs.start(config)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "160 rows in" in out
    return (Path(config.output_dir) / "outputs.jsonl").read_bytes()


def test_killed_twice_at_random(llama, tmp_path, uninterrupted):
    config = jobs.config_of(llama, tmp_path, **SAMPLED)
    file = Path(config.output_dir) / "outputs.jsonl"
    moment = random.Random(8)
    for _ in range(2):
        process = jobs.start(config)
        before = file.stat().st_size if file.exists() else 0
        while process.poll() is None and (not file.exists() or file.stat().st_size <= before):
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    rows = file.read_bytes().count(b"\n")
    assert 2 <= rows < 160
    generate.main(config)
    assert file.read_bytes() == uninterrupted
    runs = json.loads(file.with_name("manifest.json").read_text())["runs"]
    assert [run.get("rows_resumed") for run in runs] == [None, None, rows]
    assert runs[-1]["rows"] == 160 - rows


def test_full_disk(llama, tmp_path, uninterrupted):
    """A file may not grow past 18 blocks of 512 bytes: the write that does fails half-way."""
    config = jobs.config_of(llama, tmp_path, **SAMPLED)
    message = jobs.ends_in_one_line(jobs.start(config, before="ulimit -f 18; "))
    assert message.startswith(f"{config.output_dir}/outputs.jsonl: cannot write (File too large)")
    file = Path(config.output_dir) / "outputs.jsonl"
    rows = file.read_bytes().count(b"\n")
    assert 10 < rows < 160
    generate.main(config)
    assert file.read_bytes() == uninterrupted


def test_interrupted_before_every_chunk(llama, tmp_path, monkeypatch):
    """In one process: each run ends at its second write, and the last at none."""
    whole = jobs.config_of(llama, tmp_path, samples=2, output_dir=str(tmp_path / "whole"))
    generate.main(whole)
    config = jobs.config_of(llama, tmp_path, samples=2)
    append = outputs.OutputFile.append
    runs = 0
    while True:
        calls: list[Any] = []

        def stop(self, records, calls=calls):
            calls.append(records)
            if sum(bool(records) for records in calls) == 2:
                raise KeyboardInterrupt
            append(self, records)

        monkeypatch.setattr(outputs.OutputFile, "append", stop)
        runs += 1
        try:
            generate.main(config)
            break
        except KeyboardInterrupt:
            with (tmp_path / "out" / "outputs.jsonl").open("a") as file:
                file.write('{"row": 15, "text": "half')
    assert runs == 4
    assert jobs.outputs(config) == jobs.outputs(whole)


def test_finished_job_runs_nothing(llama, tmp_path, monkeypatch):
    config = jobs.config_of(llama, tmp_path)
    generate.main(config)
    before = jobs.outputs(config)
    monkeypatch.setattr(job, "load_trio", None)
    generate.main(config)
    assert jobs.outputs(config) == before


def test_another_config_or_prompts_in_the_directory(llama, tmp_path):
    config = jobs.config_of(llama, tmp_path, prompts__limit=1)
    generate.main(config)
    before = jobs.outputs(config)
    other = jobs.config_of(llama, tmp_path, prompts__limit=1, alpha=0.0)
    with pytest.raises(InputError, match=r"out: made by another job \(alpha: 1.0, now 0.0\)"):
        generate.main(other)
    rows = [{"prompt": "three four"}]
    jobs.write_prompts(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(InputError, match=r"made by another job \(prompts: "):
        generate.main(config)
    assert jobs.outputs(config) == before
    generate.main(jobs.config_of(llama, tmp_path, prompts__limit=1, overwrite=True))
    assert [row["prompt"] for row in jobs.outputs(config)] == ["three four"]


def test_check_says_what_would_run(llama, tmp_path, capsys):
    check.main(jobs.config_of(llama, tmp_path))
    report = capsys.readouterr().out
    for line in (
        "base       llama, 0.00 B parameters in float32, 2 layers, context 512, no soft-cap",
        "320 rows, 300 tokens",
        "300 ids shared by all roles",
        "antiexpert: 28 padding rows",
        "texts end at 2 '</s>'",
        f"    | [INST] {PROMPTS[0]} [/INST]",
        "8 completions, 4 at a time",
    ):
        assert line in report, line
    assert report.endswith("\nready\n")
    assert not (tmp_path / "out").exists()
    check.main(jobs.config_of(llama, tmp_path, eos_ids=(3, 2)))
    assert "texts end at 3 '<|user|>', 2 '</s>'\n" in capsys.readouterr().out


def test_errors_in_a_shell(llama, tmp_path):
    config = jobs.config_of(llama, tmp_path)
    mesh = jobs.start(config, "check", "--config.mesh.tensor=4")
    key = jobs.start(config, "check", "--config.alhpa=1")
    assert "base: kv heads (2) does not divide by the 4 devices" in jobs.ends_in_one_line(mesh)
    assert "alhpa" in jobs.ends_in_one_line(key)
