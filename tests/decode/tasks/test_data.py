"""What data that is no task's gets."""

import pytest

from decode.tasks import ds1000, load_task
from proxy_jax.errors import InputError
from tests.decode.tasks import rows

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
        ("triviaqa", {"question": "x"}, "no field 'answer' or 'Answer'"),
        ("triviaqa", {"question": "x", "answer": "y"}, "answer must be an object, not 'y'"),
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
