"""Judges that answer, that answer badly, and that do not answer."""

import itertools
import math
import re

import numpy as np
import pytest

from decode.tasks import apply_judge, ask_judge, load_judge
from decode.tasks.task import NO_CHAT, Decoding, Example, Judging, Metric, Scored, Task
from proxy_jax.errors import InputError
from proxy_jax.tokenization import Prompt

EXAMPLES = tuple(Example(name, Prompt("x"), Prompt("x"), {}) for name in ("one", "two"))
SCORED = [Scored("a", {}), Scored("b", {})]
TASK = Task(
    name="manners",
    form="clean",
    examples=EXAMPLES,
    templates=NO_CHAT,
    decoding=Decoding(max_new_tokens=1),
    metrics=(Metric("toxic"),),
    score=lambda examples, texts: SCORED,
    judging=Judging(("toxic",), lambda said: {"toxic": 2 * said["toxic"]}),
)
BOTH, SECOND = "examples one to two", "example two"


class MuteError(BaseException):
    def __str__(self):
        raise ValueError


def failing(error):
    """A generator that answers once."""

    def judge(examples, texts):
        yield {"toxic": 1.0}
        raise error

    return judge


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"toxic": 1.0}], f"{BOTH}: 1 answers for 2 texts"),
        ([], f"{BOTH}: 0 answers for 2 texts"),
        (itertools.repeat({"toxic": 1.0}), f"{BOTH}: more than 2 answers for 2 texts"),
        (None, f"{BOTH}: expected a list of answers, not None"),
        ({"toxic": 1.0}, f"{BOTH}: expected a list of answers, not {{'toxic': 1.0}}"),
        ("01", f"{BOTH}: expected a list of answers, not '01'"),
        (3, f"{BOTH}: TypeError: 'int' object is not iterable"),
        ([{"toxic": 1.0}, {"toxic": [1]}], f"{SECOND}: TypeError: float"),
    ],
)
def test_no_answers(answers, message):
    with pytest.raises(InputError, match=f"^judge '<lambda>', {re.escape(message)}") as error:
        apply_judge(TASK, lambda examples, texts: answers, EXAMPLES, SCORED)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({}, "{}"),
        (None, "None"),
        (0.5, "0.5"),
        ({"toxic": 3}, "3.0"),
        ({"toxic": -0.5}, "-0.5"),
        ({"toxic": math.nan}, "nan"),
        ({"toxic": math.inf}, "inf"),
        ({"toxic": True}, "True"),
        ({"toxic": np.bool_(True)}, "np.True_"),
        ({"toxic": "0.5"}, "'0.5'"),
    ],
)
def test_answers_that_are_no_shares(answer, shown):
    """The one before holds."""
    said = ask_judge(TASK, "a:b", lambda *_: [{"toxic": 1.0}, answer], EXAMPLES, ["a", "b"])
    assert next(said) == {"toxic": 1.0}
    message = f"judge 'a:b', {SECOND}: must answer 'toxic' with a number from 0 to 1, not {shown}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        next(said)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit(0), "it called sys.exit(0)"),
        (SystemExit("a\nb"), r"it called sys.exit('a\nb')"),
        (ValueError("a\nb"), "ValueError: a b"),
        (InputError("out of money"), "out of money"),
        (MuteError(), "MuteError: MuteError"),
        (RecursionError(), "RecursionError: RecursionError"),
    ],
)
def test_judges_that_raise(error, message):
    """What they said before that holds."""
    said = ask_judge(TASK, "a:b", failing(error), EXAMPLES, ["a", "b"])
    assert next(said) == {"toxic": 1.0}
    with pytest.raises(InputError, match=f"^judge 'a:b', {BOTH}: {re.escape(message)}$"):
        next(said)


def test_an_interrupt_passes():
    with pytest.raises(KeyboardInterrupt):
        next(ask_judge(TASK, "a:b", failing(KeyboardInterrupt()), EXAMPLES, ["a", "b"]))


def test_answers_that_count():
    """Whatever is a number, from a generator of one who prints."""

    def judge(examples, texts):
        print(texts)
        yield from ({"toxic": value} for value in (np.float32(0.25), np.asarray(1)))

    judged = apply_judge(TASK, judge, EXAMPLES, SCORED)
    assert [one.values["toxic"] for one in judged] == [0.5, 2.0]
    assert [one.extracted for one in judged] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json", "expected module:function"),
        ("no.such.module:judge", "ModuleNotFoundError"),
        ("json:judge", "AttributeError"),
        ("json:__name__", "str is not a function"),
        ("exiting_judge:judge", r"it called sys.exit\(0\)"),
    ],
)
def test_judges_that_are_not_there(name, message, tmp_path, monkeypatch):
    (tmp_path / "exiting_judge.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"^judge '{name}': {message}"):
        load_judge(name)


def test_a_task_that_asks_nothing():
    plain = Task("plain", "clean", EXAMPLES, NO_CHAT, TASK.decoding, (), TASK.score)
    with pytest.raises(InputError, match="plain needs no judge"):
        apply_judge(plain, failing(ValueError()), EXAMPLES, SCORED)
