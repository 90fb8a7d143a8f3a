"""The files that scoring reads and keeps: what is derived is made again, what is not is refused."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from decode.evaluation import results
from decode.evaluation.plan import OutputJob, TaskRun
from decode.evaluation.run import FIRST_PROMPT
from decode.evaluation.scoring import JUDGED, PREDICTIONS, predictions
from decode.tasks import choices
from decode.tasks.task import (
    NO_CHAT,
    Decoding,
    Example,
    Judging,
    Metric,
    Scored,
    Task,
    one_by_one,
)
from proxy_jax.errors import InputError
from proxy_jax.tokenization import Prompt

STATE = "scored_from.json"
FIELDS = {"letters": "AB", "answer": "B"}
EXAMPLES = tuple(Example(str(i), Prompt("x"), Prompt("x"), FIELDS) for i in range(3))
TASK = Task(
    name="manners",
    form="clean",
    examples=EXAMPLES,
    templates=NO_CHAT,
    decoding=Decoding(max_new_tokens=1),
    metrics=(Metric("long"), Metric("toxic")),
    score=one_by_one(lambda _, text: Scored(text, {"long": float(len(text) > 1)})),
    judging=Judging(("toxic",), lambda said: {"toxic": said["toxic"]}),
    choose=choices.choose,
)
ROW: dict[str, Any] = {"text": "a", "finish_reason": "stop", "new_tokens": 1}
OUTPUTS = [{"row": i, **ROW, "text": "a" * (i + 1)} for i in range(3)]
ANSWER: dict[str, Any] = {"judge": "my_judge:judge", "id": "0", "text": "a", "said": {"toxic": 0.5}}
DEEP = "[" * 100_000 + "\n"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def job_in(directory, outputs, *, judge="", letters=False) -> OutputJob:
    if outputs is not None:
        content = outputs if isinstance(outputs, bytes) else outputs.encode()
        (directory / "outputs.jsonl").write_bytes(content)
    return OutputJob(
        run=TaskRun(TASK, {}, 3, 3, letters=letters, judge=judge),
        row="base",
        number=0,
        alpha=1.0,
        directory=directory,
        examples=EXAMPLES,
        prompts=[],
        templates={"base": "raw"},
        texts=[],
        settings={},
        inputs={},
    )


def scored(job):
    return [one.scored.values for one in predictions(job, lambda count: None)]


VALUES = [{"long": 0.0}, {"long": 1.0}, {"long": 1.0}]


@pytest.mark.parametrize("file", [PREDICTIONS, STATE])
@pytest.mark.parametrize("content", ["", "null", "{}", "[1]", "\0\0", DEEP, b"\xff\n", None])
def test_what_is_derived_is_made_again(tmp_path, file, content):
    job = job_in(tmp_path, lines(OUTPUTS))
    assert scored(job) == VALUES
    path = tmp_path / file
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert scored(job) == VALUES
    assert path.read_bytes() == before


def test_what_is_whole_is_not_scored_again(tmp_path, monkeypatch):
    job = job_in(tmp_path, lines(OUTPUTS).encode() + '{"row": 0, "text": "é'.encode()[:-1])
    before = scored(job)
    monkeypatch.setattr("decode.evaluation.scoring._score", None)
    assert scored(job) == before == VALUES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(OUTPUTS[:2]), "outputs.jsonl: row 2 is no longer there"),
        (lines([*OUTPUTS, OUTPUTS[1]]), "outputs.jsonl:4: row 1 is there twice"),
        (lines([{**OUTPUTS[0], "row": True}]), "outputs.jsonl:1: row must be an integer"),
        (lines([{**OUTPUTS[0], "row": "0"}]), "outputs.jsonl:1: row must be an integer"),
        (lines([{**OUTPUTS[0], "row": -1}]), "outputs.jsonl:1: row must be at least 0"),
        (lines([ROW]), "outputs.jsonl:1: row is missing"),
        (lines([*OUTPUTS[:2], {**OUTPUTS[2], "text": 3}]), "jsonl:3: text must be a string"),
        (lines([{"row": 0}, *OUTPUTS[1:]]), "outputs.jsonl:1: text is missing"),
        (lines([{**OUTPUTS[0], "finish_reason": "ill"}, *OUTPUTS[1:]]), "1: finish_reason 'ill'"),
        (lines([{**OUTPUTS[0], "new_tokens": -1}, *OUTPUTS[1:]]), "1: new_tokens must be at least"),
        (lines([{**OUTPUTS[0], "text": "\ud800"}]), "outputs.jsonl:1: not valid Unicode"),
        ("\0\0\n", "outputs.jsonl:1: not JSON"),
        (DEEP, "outputs.jsonl:1: not JSON"),
        (b"\xff\n", "outputs.jsonl:1: not UTF-8"),
    ],
)  # fmt: skip
def test_damaged_outputs(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        scored(job_in(tmp_path, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("letters", "message"),
    [
        ({"A": -1.0, "B": float("nan")}, "2: letters: B must be finite, not nan"),
        ({"A": -1.0, "B": float("inf")}, "2: letters: B must be finite, not inf"),
        ({"A": "high"}, "2: letters: A must be a number, not 'high'"),
        ({"A": True}, "2: letters: A must be a number, not True"),
        ([1.0], "2: letters must be an object"),
        (None, "2: letters must be an object"),
    ],
)
def test_damaged_letters(tmp_path, letters, message):
    rows = [{"row": i, "letters": {"A": -2.0, "B": -1.0}} for i in range(3)]
    rows[1] = {"row": 1, "letters": letters}
    with pytest.raises(InputError, match=message):
        scored(job_in(tmp_path, lines(rows), letters=True))


def test_letters_that_cannot_follow(tmp_path):
    """They are out, and no Infinity is written."""
    given = [{"A": -2.0, "B": -1.0}, {"A": -9.0, "B": float("-inf")}, {"A": float("-inf")}]
    rows = [{"row": i, "letters": letters} for i, letters in enumerate(given)]
    values = scored(job_in(tmp_path, lines(rows), letters=True))
    assert [one["accuracy"] for one in values] == [1.0, 0.0, None]
    assert "Infinity" not in (tmp_path / PREDICTIONS).read_text()


@pytest.fixture
def asked(monkeypatch):
    """The texts that a judge was asked; it fails where `asked.fails` is."""
    texts = types.SimpleNamespace(texts=[], fails="")

    def judge(examples, some):
        for text in some:
            if text == texts.fails:
                sys.exit(0)
            texts.texts.append(text)
            yield {"toxic": 0.25}

    monkeypatch.setitem(sys.modules, "my_judge", types.SimpleNamespace(judge=judge))
    return texts


def judged_job(directory):
    return job_in(directory, lines(OUTPUTS), judge="my_judge:judge")


def test_what_a_judge_said_before_it_failed_is_kept(tmp_path, asked):
    asked.fails = "aaa"
    with pytest.raises(InputError, match=r"^judge 'my_judge:judge', examples 0 to 2: it called"):
        scored(judged_job(tmp_path))
    asked.fails, asked.texts = "", []
    assert [one["toxic"] for one in scored(judged_job(tmp_path))] == [0.25] * 3
    assert asked.texts == ["aaa"]


@pytest.mark.parametrize("end", ["\n", "", '\n{"judge": "my_judge:judge", "id": "1", "te'])
def test_the_last_line_of_answers_may_be_half_written(tmp_path, asked, end):
    other = {**ANSWER, "judge": "other:judge", "said": {"kind": 1.0}}
    (tmp_path / JUDGED).write_text(lines([other]) + json.dumps(ANSWER) + end)
    assert [one["toxic"] for one in scored(judged_job(tmp_path))][1:] == [0.25] * 2
    assert asked.texts == ["aa", "aaa"] if end else ["a", "aa", "aaa"]
    rows = [json.loads(line) for line in (tmp_path / JUDGED).read_text().splitlines()]
    assert rows[0] == other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", "judged.jsonl:1: judge is missing"),
        (lines([ANSWER, {**ANSWER, "id": 0}]), "judged.jsonl:2: id must be a string, not 0"),
        (lines([{**ANSWER, "text": None}]), "judged.jsonl:1: text is missing"),
        (lines([{**ANSWER, "said": 0.5}]), "judged.jsonl:1: said must be an object, not 0.5"),
        (lines([{**ANSWER, "said": {}}]), "judged.jsonl:1: said: toxic is missing"),
        (lines([{**ANSWER, "said": {"toxic": float("nan")}}]), "said: toxic must be finite"),
        (lines([{**ANSWER, "said": {"toxic": 2}}]), "said: toxic must be between 0 and 1, not 2"),
        (lines([{**ANSWER, "judge": "b:c", "said": {"x": "y"}}]), "said: x must be a number"),
        ("\0\n", "judged.jsonl:1: not JSON"),
        (DEEP, "judged.jsonl:1: not JSON"),
        (b"\xff\n", "judged.jsonl:1: not UTF-8"),
    ],
)
def test_damaged_answers_are_refused(tmp_path, asked, content, message):
    """They may have cost money: nothing is asked, nothing written."""
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / JUDGED).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        scored(judged_job(tmp_path))
    assert "\n" not in str(error.value)
    assert asked.texts == []
    assert (tmp_path / JUDGED).read_bytes() == content


@pytest.mark.parametrize("content", [None, "", "[]", '{"base": 3}', "{}", DEEP])
def test_a_lost_first_prompt_is_left_out(tmp_path: Path, content):
    job = job_in(tmp_path, lines(OUTPUTS))
    (tmp_path / FIRST_PROMPT).write_text('{"base": "<s> x"}')
    assert results._first_prompt(job) == {"base": "<s> x"}
    (tmp_path / FIRST_PROMPT).unlink()
    if content is not None:
        (tmp_path / FIRST_PROMPT).write_text(content)
    assert results._first_prompt(job) == {}
