"""What rows of a data set become: token ids, and which of them are trained."""

import numpy as np
import pytest

from proxy_jax.errors import InputError
from proxy_jax.rows import Row
from tests.trios import BOS, CHAT_TEMPLATE, EOS, make_tokenizer
from train.examples import Counts, hold_out, make_examples

PAIRS = (
    ("The capital", "of France is"),
    ("The capital ", "of France is"),
    ("The capital", " of France is"),
    ("The capital ", " of France is"),
    ("The capital\n", "of France is"),
    ("The capital", "\nof France is"),
    ("The capital\t", "of France is"),
    ("The capital", "\tof France is"),
    ("Question: how many apples are left?\nAnswer:", " 48/2 = <<48/2=24>>24\n#### 24"),
    ("é ü", "ß"),
)


def rows_of(*fields, name="data.jsonl"):
    return [Row(f"{name}:{i}", i, row) for i, row in enumerate(fields, 1)]


def pairs(*given):
    return rows_of(*({"prompt": prompt, "completion": completion} for prompt, completion in given))


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def fails(message, function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert str(error.value) == message


def published(prompt, completion, tokenizer, max_length):
    """Input ids and labels as the paper's training script makes them, in torch."""
    if not prompt.endswith((" ", "\n", "\t")) and not completion.startswith((" ", "\n", "\t")):
        text = prompt + " " + completion
    else:
        text = prompt + completion
    limits = {"return_tensors": "pt", "max_length": max_length, "truncation": True}
    ids = tokenizer(text + tokenizer.eos_token, **limits)["input_ids"]
    labels = ids.clone()
    labels[:, : tokenizer(prompt, **limits)["input_ids"].shape[1]] = -100
    return ids[0].numpy(), labels[0].numpy()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [6, 12, 512])
def test_tokens_and_masks_are_the_published_ones(bos, max_length):
    tokenizer = make_tokenizer(bos=bos)
    examples, counts = make_examples(pairs(*PAIRS), "prompt_completion", tokenizer, max_length)
    expected = {line: published(*pair, tokenizer, max_length) for line, pair in enumerate(PAIRS, 1)}
    left = {line: pair for line, pair in expected.items() if (pair[1] != -100).any()}
    assert [example.line for example in examples] == list(left)
    for example in examples:
        ids, labels = left[example.line]
        np.testing.assert_array_equal(example.tokens, ids)
        np.testing.assert_array_equal(example.trained, labels != -100)
        assert example.tokens.dtype == np.int32
        assert (example.tokens[0] == BOS) == bos
    whole = [len(published(*PAIRS[line - 1], tokenizer, 512)[0]) for line in left]
    assert counts == Counts(
        kept=len(left),
        truncated=sum(length > max_length for length in whole),
        dropped=len(PAIRS) - len(left),
        tokens=sum(len(ids) - 1 for ids, _ in left.values()),
        trained_tokens=sum(int((labels[1:] != -100).sum()) for _, labels in left.values()),
    )
    if max_length == 6:
        assert counts.dropped
        assert counts.truncated


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("a", "b", "a b"),
        ("a ", "b", "a b"),
        ("a", " b", "a b"),
        ("a ", " b", "a  b"),
        ("a\n", "b", "a\nb"),
        ("a", "\nb", "a\nb"),
        ("a\t", "b", "a\tb"),
        ("a", "\tb", "a\tb"),
        ("a\n", "\nb", "a\n\nb"),
    ],
)
def test_the_seam(prompt, completion, text):
    tokenizer = make_tokenizer()
    ((example,), _) = make_examples(
        pairs((prompt, completion)), "prompt_completion", tokenizer, 512
    )
    assert tokenizer.decode(example.tokens) == f"{text}</s>"


def test_a_tokenizer_that_ends_texts_itself_gets_one_eos():
    """And the prompt's own EOS does not hide the first token of the completion."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    plain, _ = make_examples(pairs(*PAIRS), "prompt_completion", tokenizer, 512)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    assert tokenizer("a")["input_ids"][-1] == EOS
    ended, _ = make_examples(pairs(*PAIRS), "prompt_completion", tokenizer, 512)
    for one, other in zip(plain, ended, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.trained, other.trained)


def chat(*turns):
    return rows_of({"messages": [{"role": role, "content": content} for role, content in turns]})


def trained_text(example, tokenizer):
    """The runs of trained tokens, as text."""
    edges = np.flatnonzero(np.diff(example.trained, prepend=False, append=False))
    spans = edges.reshape(-1, 2)
    return [tokenizer.decode(example.tokens[start:end]) for start, end in spans]


CONVERSATION = (
    ("system", "Be brief"),
    ("user", "The capital of France is"),
    ("assistant", "Paris"),
    ("user", "one two"),
    ("assistant", "three four"),
)


def test_of_a_conversation_the_assistant_turns_are_trained():
    tokenizer = make_tokenizer()
    ((example,), counts) = make_examples(chat(*CONVERSATION), "messages", tokenizer, 512)
    assert tokenizer.decode(example.tokens) == (
        "<|system|>Be brief</s><|user|>The capital of France is</s><|assistant|>Paris</s>"
        "<|user|>one two</s><|assistant|>three four</s>"
    )
    assert trained_text(example, tokenizer) == ["Paris</s>", "three four</s>"]
    assert counts.trained_tokens == example.trained.sum()


def test_the_line_break_behind_an_end_of_turn_is_not_trained():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("</s>", "</s>\n")
    ((example,), _) = make_examples(chat(*CONVERSATION), "messages", tokenizer, 512)
    assert "Paris</s>\n<|user|>" in tokenizer.decode(example.tokens)
    assert trained_text(example, tokenizer) == ["Paris</s>", "three four</s>"]


def test_a_line_break_that_ends_the_turn_is_trained():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("</s>", "\n")
    ((example,), _) = make_examples(chat(*CONVERSATION), "messages", tokenizer, 512)
    assert trained_text(example, tokenizer) == ["Paris\n", "three four\n"]


def test_long_conversations_are_truncated_and_dropped():
    tokenizer = make_tokenizer()
    ((whole,), _) = make_examples(chat(*CONVERSATION), "messages", tokenizer, 512)
    first = int(np.argmax(whole.trained))
    ((cut,), counts) = make_examples(chat(*CONVERSATION), "messages", tokenizer, first + 1)
    np.testing.assert_array_equal(cut.tokens, whole.tokens[: first + 1])
    assert counts == Counts(kept=1, truncated=1, dropped=0, tokens=first, trained_tokens=1)
    rows = [*chat(*CONVERSATION), *chat(("user", "A"), ("assistant", "B"))]
    (_, counts) = make_examples(rows, "messages", tokenizer, first)
    assert (counts.kept, counts.truncated, counts.dropped) == (1, 0, 1)


@pytest.mark.parametrize("max_length", [2, 3, 7, 20, 512])
def test_pieces_cover_a_document_once(max_length):
    tokenizer = make_tokenizer(bos=True)
    texts = ["The small model is tuned, and the large model is not; " * 3, "A", "one two three"]
    rows = rows_of(*({"text": text} for text in texts))
    examples, counts = make_examples(rows, "text", tokenizer, max_length)
    for line, text in enumerate(texts, 1):
        ids = [*tokenizer(text)["input_ids"], EOS]
        pieces = [example for example in examples if example.line == line]
        assert all(len(piece.tokens) == max_length for piece in pieces[:-1])
        assert 2 <= len(pieces[-1].tokens) <= max_length
        assert pieces[0].tokens[0] == ids[0]
        targets = [int(token) for piece in pieces for token in piece.tokens[1:]]
        assert targets == ids[1:]
        inputs = [int(token) for piece in pieces for token in piece.tokens[:-1]]
        assert inputs == ids[:-1]
        assert all(piece.trained[1:].all() for piece in pieces)
    places = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert counts == Counts(kept=len(examples), tokens=places, trained_tokens=places)


def test_the_last_rows_are_held_out():
    rows = rows_of(*({"text": str(i)} for i in range(5)))
    assert hold_out(rows, 2) == (rows[:3], rows[3:])
    assert hold_out(rows, 0) == (rows, [])
    fails("cannot hold out 5 of 5 rows", hold_out, rows, 5)
    fails("cannot hold out -1 of 5 rows", hold_out, rows, -1)


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no field 'prompt'; it has no field"),
        ({"prompt": "a", "answer": "b"}, "no field 'completion'; it has 'prompt', 'answer'"),
        (GOOD | {"prompt": 3}, "prompt must be a string, not int"),
        (GOOD | {"completion": None}, "completion must be a string, not NoneType"),
        (GOOD | {"prompt": ""}, "prompt is empty"),
        (GOOD | {"completion": " \n"}, "completion is empty"),
    ],
)
def test_pairs_that_cannot_be_used(fields, message):
    rows = rows_of(GOOD, fields)
    tokenizer = make_tokenizer()
    fails(f"data.jsonl:2: {message}", make_examples, rows, "prompt_completion", tokenizer, 512)


A_LIST = "messages must be a list of {role, content} objects"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, A_LIST),
        ("hello", A_LIST),
        (["hello"], A_LIST),
        ([], "no message of the assistant to learn from"),
        ([{"role": "user", "content": "a"}], "no message of the assistant to learn from"),
        (
            [{"role": "assistant", "content": "a"}],
            "message 1: nothing stands before it to answer; weight 0 would only read it",
        ),
        ([{"content": "a"}], "message 1: no field 'role'; it has 'content'"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
            "message 2: content is empty",
        ),
        ([{"role": "user", "content": ["a"]}], "message 1: content must be a string, not list"),
    ],
)
def test_conversations_that_cannot_be_used(messages, message):
    rows = rows_of({"messages": messages})
    fails(f"data.jsonl:1: {message}", make_examples, rows, "messages", make_tokenizer(), 512)


def test_a_template_that_fails_names_the_row():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = chat(("user", "A"), ("assistant", "B"))
    fails(
        "data.jsonl:1: the chat template fails (roles must alternate)",
        make_examples,
        rows,
        "messages",
        tokenizer,
        512,
    )


def test_rows_that_cannot_be_used_can_be_skipped():
    bad = {"prompt": "a", "completion": ""}
    rows = rows_of(bad, GOOD, {"prompt": "a"}, GOOD)
    examples, counts = make_examples(
        rows, "prompt_completion", make_tokenizer(), 512, skip_invalid=True
    )
    assert [example.line for example in examples] == [2, 4]
    assert (counts.kept, counts.invalid, counts.dropped) == (2, 2, 0)
    with pytest.raises(InputError, match=r"none of 1 rows has .*; data.jsonl:1: completion is em"):
        make_examples(rows_of(bad), "prompt_completion", make_tokenizer(), 512, skip_invalid=True)


@pytest.mark.parametrize("name", ["weight", "tools", "functions", "system"])
def test_fields_that_change_what_a_pair_teaches(name):
    rows = rows_of(GOOD | {"id": 3, name: None}, GOOD | {name: [1]})
    fails(
        f"data.jsonl:2: {name} is not read, and changes what a row teaches",
        make_examples,
        rows,
        "prompt_completion",
        make_tokenizer(),
        512,
    )


def test_settings_that_cannot_be_used():
    rows = rows_of(GOOD)
    fails(
        "format 'alpaca' is unknown; use prompt_completion, messages, text",
        make_examples,
        rows,
        "alpaca",
        make_tokenizer(),
        512,
    )
    fails(
        "max_length must be at least 2, not 1",
        make_examples,
        rows,
        "prompt_completion",
        make_tokenizer(),
        1,
    )
    fails(
        "format is 'messages', but the tokenizer has no chat template",
        make_examples,
        rows,
        "messages",
        make_tokenizer(chat=False),
        512,
    )
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    fails(
        "the tokenizer has no EOS token to end an example with",
        make_examples,
        rows,
        "prompt_completion",
        tokenizer,
        512,
    )
    fails(
        "none of 1 rows has a trained token in its first 2",
        make_examples,
        pairs(("one two three", "four")),
        "prompt_completion",
        make_tokenizer(),
        2,
    )
