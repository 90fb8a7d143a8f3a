"""Files of each kind, the hub, and what bad data gets."""

import csv
import gzip
import json
import sys
import types

import pytest

from decode.tasks import ds1000, load_task
from decode.tasks.data import Hub, read_rows
from proxy_jax.errors import InputError
from tests.decode.tasks import rows

HUB = Hub("owner/set", "part", "test")


def test_every_kind_of_file_reads_the_same(tmp_path):
    lines = rows.write(tmp_path / "a.jsonl", rows.TRUTHFULQA)
    (tmp_path / "b.json").write_text(json.dumps(rows.TRUTHFULQA))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(rows.TRUTHFULQA).encode()))
    with (tmp_path / "d.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows.TRUTHFULQA[0])
        writer.writeheader()
        writer.writerows(rows.TRUTHFULQA)
    for name in (lines, tmp_path / "b.json", tmp_path / "c.json.gz", tmp_path / "d.csv"):
        assert [row.fields for row in read_rows(str(name), HUB)] == rows.TRUTHFULQA


def test_hub(monkeypatch):
    asked = []

    def load_dataset(*names, **settings):
        asked.append((names, settings))
        return [{"a": 1}]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    address = Hub("hf://datasets/owner/set/file.json")
    for location, hub in (("", HUB), ("other/copy", HUB), ("", address)):
        assert [row.fields for row in read_rows(location, hub)] == [{"a": 1}]
    assert asked == [
        (("owner/set", "part"), {"split": "test"}),
        (("other/copy", "part"), {"split": "test"}),
        (("json",), {"data_files": address.id, "split": "train"}),
    ]


def test_hub_that_does_not_answer(monkeypatch):
    def load_dataset(*names, **settings):
        raise ConnectionError("no route\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"owner/set: no such file, .* hub \(no route\)$"):
        read_rows("", HUB)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(InputError, match="need the datasets library"):
        load_task("gsm")
    with pytest.raises(InputError, match="not on the hub; give its file"):
        load_task("realtimeqa")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a"\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: expected a JSON object, found list"),
        ("a.jsonl", "\n", "a.jsonl: no rows"),
        ("a.json", '{"b": 1}', "a.json: expected a list of rows"),
        ("a.json", "[1]", "a.json: row 1: expected a JSON object, found int"),
        ("a.csv", "a,b\n", "a.csv: no rows"),
        ("a.parquet", "x", "a.parquet: expected a .jsonl, .json, .csv file"),
        ("a.jsonl", b'{"a": "\xe9"}', "a.jsonl: not UTF-8"),
        ("a.jsonl.gz", "not compressed", "a.jsonl.gz: Not a gzipped file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_rows(str(path), HUB)
    assert "\n" not in str(error.value)


def test_absent_file(tmp_path):
    with pytest.raises(InputError, match=r"b.jsonl: No such file"):
        read_rows(str(tmp_path / "b.jsonl"), HUB)
    with pytest.raises(InputError, match=r"data/b.jsonl: No such file"):
        read_rows("data/b.jsonl", HUB)


NO_TEST = {**rows.ds1000_row(0), "code_context": "x = 1"}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm", {"question": "x"}, "1: no field 'answer'; it has 'question'"),
        ("gsm", {"question": "x", "answer": "12"}, "1: answer does not end in '#### ' and a"),
        ("gsm", {"question": "x", "answer": "#### many"}, "1: answer does not end in"),
        ("gsm", {"question": " ", "answer": "#### 1"}, "1: question is empty"),
        ("gsm", {"question": 3, "answer": "#### 1"}, "1: question must be a string, not int"),
        ("truthfulqa_mc", {"Question": "x"}, "no field 'Best Answer' or 'best_answer'"),
        ("truthfulqa_mc", {**rows.TRUTHFULQA[0], "Incorrect Answers": ";"},
         "1: Incorrect Answers has no answer"),
        ("triviaqa", {"question": "x", "answers": []}, "answers must be a list of strings"),
        ("triviaqa", {"question": "x", "answer": "y"}, "no answer .the test questions have none"),
        ("realtimeqa", {**rows.REALTIMEQA[0], "answer": ["4"]}, "the index of one of 4 choices"),
        ("realtimeqa", {**rows.REALTIMEQA[0], "answer": -1}, "one of 4 choices, not -1"),
        ("humaneval", {**rows.HUMANEVAL[0], "test": ""}, "1: test is empty"),
        ("alpaca_eval", {"instruction": "x"}, "1: no field 'output'"),
        ("ds1000", NO_TEST, "1: code_context has no test_execution"),
        ("ds1000", rows.ds1000_row(0, "Excel"), "library 'Excel' is not one of Pandas, Numpy"),
        ("ds1000", rows.ds1000_row(0, test_case_cnt=None), "metadata needs problem_id, test_case"),
        ("ds1000", {**rows.ds1000_row(0), "metadata": "x"}, "metadata must be an object"),
    ],
)  # fmt: skip
def test_bad_rows(tmp_path, task, row, message):
    path = rows.write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(InputError, match=message) as error:
        load_task(task, path)
    assert "\n" not in str(error.value)


def test_library_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(ds1000._LIBRARIES, "Numpy", "no_such_module")
    path = rows.write(tmp_path / "one.jsonl", [rows.ds1000_row(0)])
    with pytest.raises(InputError, match="the problems need no_such_module, which this environ"):
        load_task("ds1000", path)


def test_twice_the_same_id(tmp_path):
    path = rows.write(tmp_path / "two.jsonl", rows.HUMANEVAL * 2)
    with pytest.raises(InputError, match="humaneval: two examples are called 'HumanEval/0'"):
        load_task("humaneval", path)


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match="task 'mmlu' is unknown; use alpaca_eval, ds1000, gsm"):
        load_task("mmlu")
    path = rows.write(tmp_path / "a.jsonl", rows.GSM)
    with pytest.raises(InputError, match="form 'own' is unknown; use published or clean"):
        load_task("gsm", path, "own")  # type: ignore[arg-type]


def test_toxigen_files(tmp_path):
    with pytest.raises(InputError, match=r"expected a directory of hate_GROUP_1k.txt"):
        load_task("toxigen", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"no file hate_physical_disability_1k.txt or hate_"):
        load_task("toxigen", str(tmp_path))
    (tmp_path / "hate_physical_disability.txt").write_text("\n")
    with pytest.raises(InputError, match=r"hate_physical_disability.txt: no prompts"):
        load_task("toxigen", str(tmp_path))
