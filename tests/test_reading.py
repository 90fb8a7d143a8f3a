"""The boundary to files: what libraries raise, JSON files, and fields that are checked as read."""

import json
import os

import pytest
from tokenizers import Tokenizer, models

from proxy_jax.errors import InputError
from proxy_jax.reading import Fields, parse_json, read_json, reading, reason, shown


@pytest.mark.parametrize(
    "error",
    [
        RecursionError("too deep"),
        MemoryError(),
        KeyError("k"),
        ValueError("a\nb"),
        OSError(5, "no"),
    ],
)
def test_what_a_library_raises_is_one_line(error):
    with pytest.raises(InputError) as caught, reading("f.bin", "not whole"):
        raise error
    assert str(caught.value).startswith("f.bin: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_an_error_that_cannot_say_what_it_is():
    class MuteError(Exception):
        def __str__(self):
            raise ValueError

    assert reason(MuteError()) == "MuteError"


def test_a_panic_of_a_library_in_rust_is_one_line():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    content = json.loads(tokenizer.to_str())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "b", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    tokenizer = Tokenizer.from_str(json.dumps(content))
    with pytest.raises(InputError, match=r"^t: broken \("), reading("t", "broken"):
        tokenizer.encode("a")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_interrupts_pass(error):
    with pytest.raises(type(error)), reading("f.bin"):
        raise error


def test_an_input_error_stays_as_it_is():
    with pytest.raises(InputError, match=r"^inner$"), reading("f.bin"):
        raise InputError("inner")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": ', "not JSON"),
        (b"\xff", "not UTF-8"),
        (b'{"a": "\\ud800"}', "not valid Unicode"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_read_json_names_the_file(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"x.json: {message}"):
        read_json(path)


def test_read_json_of_no_file(tmp_path):
    with pytest.raises(InputError, match=r"absent.json: no such file"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(InputError, match="not a regular file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # would wait for somebody to write
    with pytest.raises(InputError, match="pipe: not a regular file"):
        read_json(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="loop"):
        read_json(tmp_path / "loop")


def fields(**values):
    return Fields("f.json", json.loads(json.dumps(values)))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.integer("a"), "f.json: a is missing$"),
        (lambda f: f.integer("null"), "null is missing$"),
        (lambda f: f.integer("true"), "true must be an integer, not True$"),
        (lambda f: f.integer("half"), "half must be an integer, not 0.5$"),
        (lambda f: f.integer("text"), "text must be an integer, not '7'$"),
        (lambda f: f.integer("nan"), "nan must be an integer, not nan$"),
        (lambda f: f.integer("seven", 8), "seven must be at least 8, not 7$"),
        (lambda f: f.integer("seven", high=6), "seven must be at most 6, not 7$"),
        (lambda f: f.integer("huge", 0, 10), "between 0 and 10, not an integer of more than 40"),
        (lambda f: f.real("nan"), "nan must be finite, not nan$"),
        (lambda f: f.real("huge"), "huge is out of range"),
        (lambda f: f.real("zero", above=0), "zero must be above 0, not 0$"),
        (lambda f: f.real("text"), "text must be a number, not '7'$"),
        (lambda f: f.flag("seven"), "seven must be true or false, not 7$"),
        (lambda f: f.string("seven"), "seven must be a string, not 7$"),
        (lambda f: f.choice("text", ("a", "b")), "text '7' is not supported; known: a, b$"),
        (lambda f: f.array("seven", int), "seven must be a list, not 7$"),
        (lambda f: f.array("mixed", int), "mixed must hold int values, not 'x'$"),
        (lambda f: f.array("bools", int), "bools must hold int values, not True$"),
        (lambda f: f.inner("seven"), "seven must be an object, not 7$"),
    ],
)
def test_fields_that_do_not_fit(read, message):
    values = fields(null=None, true=True, half=0.5, text="7", seven=7, zero=0, huge=10**400,
                    mixed=[1, "x"], bools=[True], nan=float("nan"))  # fmt: skip
    with pytest.raises(InputError, match=message):
        read(values)


def test_fields_that_fit():
    values = fields(seven=7, two=2.0, half=0.5, ids=[1, 2], inner={"x": 1}, null=None)
    assert values.integer("seven", 0, 7) == 7
    assert values.integer("two") == 2
    assert isinstance(values.integer("two"), int)
    assert values.real("half", 0, 1, above=0) == 0.5
    assert values.array("ids", int) == (1, 2)
    assert values.array("ids", float) == (1, 2)
    assert values.integer("null", default=3) == 3
    assert values.inner("absent") is None
    assert values.inner("inner").integer("x") == 1
    with pytest.raises(InputError, match=r"f.json: inner: y is missing"):
        values.inner("inner").integer("y")


def test_shown_is_short():
    assert len(shown("x" * 10_000)) == 80
    assert "40 digits" in shown(10**10_000)


def test_parse_json_of_bytes():
    assert parse_json(b'{"a": "\\u00e9"}', "x") == {"a": "\u00e9"}
