"""What data that is no task's gets."""

import math
from typing import Any

import pytest

from decode.tasks import ds1000, load_task
from proxy_jax.errors import InputError
from tests.decode.tasks import rows

NO_IDS: list[Any] = [math.nan, math.inf, [7], {}, True]
NO_INDICES: list[Any] = [True, [True], 2.0, math.nan, "c", [], [1, 2], None, {}, 10**50]
NO_TEST = {**rows.ds1000_row(0), "code_context": "x = 1"}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm", {"question": "x"}, "1: no field 'answer'; it has 'question'"),
        ("gsm", {"question": "x", "answer": "12"}, "1: answer does not end in '#### ' and a"),
        ("gsm", {"question": "x", "answer": "#### many"}, "1: answer does not end in"),
        *(
            ("gsm", {"question": "x", "answer": f"#### {number}"}, "1: answer does not end in")
            for number in ("nan", "inf", "-Infinity", "1e999")
        ),
        ("gsm", {"question": "x", "answer": 12}, "1: answer must be a string, not int"),
        ("gsm", {"question": "x", "answer": math.nan}, "1: answer must be a string, not float"),
        ("gsm", {"question": " ", "answer": "#### 1"}, "1: question is empty"),
        ("gsm", {"question": 3, "answer": "#### 1"}, "1: question must be a string, not int"),
        ("truthfulqa_mc", {"Question": "x"}, "no field 'Best Answer' or 'best_answer'"),
        ("truthfulqa_mc", {**rows.TRUTHFULQA[0], "Incorrect Answers": ";"},
         "1: Incorrect Answers has no answer"),
        ("triviaqa", {"question": "x", "answers": []}, "answers must be a list of strings"),
        ("triviaqa", {"question": "x", "answers": [" "]}, "1: answers are all empty"),
        ("triviaqa", {"question": "x", "answers": "yes"}, "must be a list of strings, not 'yes'"),
        ("triviaqa", {"question": "x", "answers": ["a", 3]}, "answers must be a list of strings"),
        *(
            (
                "triviaqa",
                {"question": "x", "answers": ["a"], "question_id": value},
                "1: question_id must be a string or a number, not",
            )
            for value in NO_IDS
        ),
        ("triviaqa", {"question": "x"}, "no field 'answer' or 'Answer'"),
        ("triviaqa", {"question": "x", "answer": "y"}, "answer must be an object, not 'y'"),
        ("realtimeqa", {**rows.REALTIMEQA[0], "answer": ["4"]}, "the index of one of 4 choices"),
        ("realtimeqa", {**rows.REALTIMEQA[0], "answer": -1}, "one of 4 choices, not -1"),
        *(
            (
                "realtimeqa",
                {**rows.REALTIMEQA[0], "answer": answer},
                "1: answer must be the index of one of 4 choices, not",
            )
            for answer in NO_INDICES
        ),
        ("realtimeqa", {**rows.REALTIMEQA[0], "choices": list("abcdefghijk"), "answer": 10},
         "1: 11 choices are more than the 10 letters"),
        ("realtimeqa", {**rows.REALTIMEQA[0], "choices": "abc"}, "1: choices must be a list of"),
        ("realtimeqa", {**rows.REALTIMEQA[0], "choices": [1, 2]}, "1: choices must be a list of"),
        ("realtimeqa", {**rows.REALTIMEQA[0], "question_id": 3}, "question_id must be a string"),
        ("humaneval", {**rows.HUMANEVAL[0], "test": ""}, "1: test is empty"),
        ("humaneval", {**rows.HUMANEVAL[0], "test": "x = 1"}, "1: test has no check"),
        ("humaneval", {**rows.HUMANEVAL[0], "entry_point": "f(x)"}, "entry_point must be a name"),
        ("alpaca_eval", {**rows.ALPACA[0], "dataset": math.nan}, "1: dataset must be a string"),
        ("questions", {"prompt": "x", "completion": 3}, "1: completion must be a string, not int"),
        ("questions", {"prompt": "x", "completion": " "}, "1: completion is empty"),
        ("truthfulqa_open", {**rows.TRUTHFULQA[0], "Correct Answers": [1]}, "1: Correct Answers m"),
        ("alpaca_eval", {"instruction": "x"}, "1: no field 'output'"),
        ("ds1000", NO_TEST, "1: code_context has no test_execution"),
        ("ds1000", rows.ds1000_row(0, "Excel"), "library 'Excel' is not supported; known: Pand"),
        ("ds1000", rows.ds1000_row(0, ["Numpy"]), "1: library must be a string, not"),  # type: ignore[arg-type]
        *(
            ("ds1000", rows.ds1000_row(0, test_case_cnt=count), f"1: test_case_cnt {message}")
            for count, message in [
                (None, "is missing"), (0, "must be between 1 and 1000"), (10**20, "must be betw"),
                (True, "must be an integer"), (2.5, "must be an integer"), ("3", "must be an int"),
            ]
        ),
        ("ds1000", rows.ds1000_row([1]), "1: problem_id must be a string or a number"),  # type: ignore[arg-type]
        ("ds1000", rows.ds1000_row(0, perturbation_type=None), "1: perturbation_type is missing"),
        ("ds1000", {**rows.ds1000_row(0), "metadata": "x"}, "metadata must be an object"),
    ],
)  # fmt: skip
def test_bad_rows(tmp_path, task, row, message):
    path = rows.write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(InputError, match=message) as error:
        load_task(task, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Question,Best Answer\nx,y\n", "record 1: no field 'Incorrect Answers'"),
        ("Question,Best Answer,Incorrect Answers\nx\n", "record 1: Best Answer must be a string"),
        ("Question,Best Answer,Incorrect Answers\nx,y,z,w\n", "record 1: more values than the he"),
        (b"Question,Best Answer,Incorrect Answers\nx,\xe9,z\n", "bad.csv: not UTF-8"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        load_task("truthfulqa_mc", str(path))


def test_ids_are_texts(tmp_path):
    given = [{**rows.TRIVIAQA[0], "question_id": name} for name in ("a", 0, 7.5, None, 10**30)]
    path = rows.write(tmp_path / "ids.jsonl", given)
    names = [example.id for example in load_task("triviaqa", path).examples]
    assert names == ["a", "0", "7.5", "3", str(10**30)]


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
