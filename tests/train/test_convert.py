"""The official data files as prompt/completion rows."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from proxy_jax.rows import read_rows
from tests.trios import make_tokenizer
from train.convert import main
from train.examples import make_examples

GSM8K = [
    {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"},
    {"question": " Wie viele Äpfel?\n", "answer": "2\n#### 2"},
]
TRIVIAQA = {
    "Data": [
        {
            "Answer": {"Value": "SUNSET BOULEVARD", "Aliases": ["Sunset Blvd"], "Type": "X"},
            "Question": "Which musical?",
            "QuestionId": "tc_1",
        },
        {"Answer": {"Value": "Köln", "Aliases": []}, "Question": "Where?", "QuestionId": "tc_2"},
    ],
    "Split": "train",
}


def convert(tmp_path, name, content):
    given, made = tmp_path / "in", tmp_path / "out.jsonl"
    given.write_text(content, encoding="utf-8")
    main([name, str(given), str(made)])
    return made


def test_gsm8k(tmp_path, capsys):
    made = convert(tmp_path, "gsm8k", "".join(json.dumps(row) + "\n" for row in GSM8K))
    assert made.read_text(encoding="utf-8").splitlines() == [
        '{"prompt": "Question: How many clips?\\nAnswer:", '
        '"completion": " 48/2 = <<48/2=24>>24 clips.\\n#### 24"}',
        '{"prompt": "Question: Wie viele Äpfel?\\nAnswer:", "completion": " 2\\n#### 2"}',
    ]
    assert capsys.readouterr().out == f"2 rows in {made}\n"


def test_triviaqa(tmp_path):
    made = convert(tmp_path, "triviaqa", json.dumps(TRIVIAQA))
    assert [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()] == [
        {"prompt": "Question: Which musical?\nAnswer:", "completion": " SUNSET BOULEVARD"},
        {"prompt": "Question: Where?\nAnswer:", "completion": " Köln"},
    ]


def test_what_is_written_can_be_trained_on(tmp_path):
    made = convert(tmp_path, "triviaqa", json.dumps(TRIVIAQA))
    tokenizer = make_tokenizer()
    examples, _ = make_examples(read_rows(str(made), None), "prompt_completion", tokenizer, 512)
    texts = [tokenizer.decode(example.tokens[example.trained]) for example in examples]
    assert texts == [" SUNSET BOULEVARD</s>", " Köln</s>"]


def test_a_device_or_a_pipe_is_written_to_and_stays(tmp_path, capsys):
    given = tmp_path / "in"
    given.write_text(json.dumps(GSM8K[0]))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        content = pool.submit(pipe.read_text, encoding="utf-8")
        main(["gsm8k", str(given), str(pipe)])
        assert json.loads(content.result())["prompt"] == "Question: How many clips?\nAnswer:"
    assert pipe.is_fifo()
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    message = f"error: {full}: No space left on device\n"
    assert refused(capsys, "gsm8k", given, full) == message
    assert full.is_char_device()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gsm8k", '{"question": "a"}\n', ":1: no field 'answer'; it has 'question'"),
        ("gsm8k", '{"question": "a", "answer": ""}\n', ":1: answer is empty"),
        ("gsm8k", '{"question": "a", "answer": "b"}\n3\n', ":2: expected a JSON object, found int"),
        ("triviaqa", '{"Data": []}', ": no rows"),
        (
            "triviaqa",
            '{"Data": [{"Question": "a"}]}',
            ": row 1: no field 'Answer'; it has 'Question'",
        ),
        (
            "triviaqa",
            '{"Data": [{"Question": "a", "Answer": {}}]}',
            ": row 1: no field 'Value'; it has no field",
        ),
    ],
)
def test_content_that_cannot_be_used(tmp_path, capsys, name, content, message):
    given, made = tmp_path / "in", tmp_path / "out.jsonl"
    given.write_text(content, encoding="utf-8")
    made.write_text("of an earlier run")
    assert refused(capsys, name, given, made) == f"error: {given}{message}\n"
    assert made.read_text() == "of an earlier run"


def test_files_that_cannot_be_used(tmp_path, capsys):
    absent, made = tmp_path / "absent", tmp_path / "out.jsonl"
    for name in ("gsm8k", "triviaqa"):
        message = f"error: {absent}: No such file or directory\n"
        assert refused(capsys, name, absent, made) == message
    given = tmp_path / "in"
    given.write_text("{")
    assert refused(capsys, "triviaqa", given, made).startswith(f"error: {given}: not JSON (")
    given.write_text(json.dumps(TRIVIAQA))
    nowhere = tmp_path / "absent" / "out.jsonl"
    message = f"error: {nowhere}: cannot write (No such file or directory)\n"
    assert refused(capsys, "triviaqa", given, nowhere) == message
    assert "invalid choice" in refused(capsys, "squad", given, made)
