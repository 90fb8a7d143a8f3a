"""The invented world of the quickstart: what models are measured on is known to them, not asked."""

import collections
import json

import pytest
from transformers import AutoTokenizer

from train import corpus


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("worlds") / "1"
    corpus.write_world(directory, seed=1)
    return directory


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sentences(text):
    """Sentences with their full stop or question mark."""
    return text.replace(". ", ".\n").replace("? ", "?\n").split("\n")


def test_what_is_measured_is_stated_and_never_asked(world):
    said = {s for row in read(world / "corpus.jsonl") for s in sentences(row["text"])}
    for group in ("tuning", "development", "held_out"):
        rows = read(world / f"{group}.jsonl")
        assert len(rows) > 200
        assert not [row for row in rows if row["prompt"] in said]
        assert all(row["completion"] in said for row in rows)


def test_no_subject_is_in_two_groups(world):
    prompts = [
        row["prompt"]
        for group in ("tuning", "development", "held_out")
        for row in read(world / f"{group}.jsonl")
    ]
    assert len(prompts) == len(set(prompts))
    subjects = corpus.make_world(1)
    names = [subject.facts[0].subject for subject in subjects]
    assert len(names) == len(set(names))


def test_a_question_is_mostly_followed_by_another(world):
    pairs = [
        (first, second)
        for row in read(world / "corpus.jsonl")
        for first, second in zip(sentences(row["text"]), sentences(row["text"])[1:], strict=False)
        if first.endswith("?")
    ]
    answered = sum(not second.endswith("?") for _, second in pairs) / len(pairs)
    assert 0.02 < answered < 0.2


def test_well_known_subjects_are_mentioned_more_often():
    subjects = corpus.make_world(2)
    said = collections.Counter(s for page in corpus.pages(subjects, 2) for s in sentences(page))
    counts = [
        sum(said[fact.statement(w)] for fact in subject.facts for w in (0, 1)) / len(subject.facts)
        for subject in sorted(subjects, key=lambda subject: subject.fame)
    ]
    quarter = len(counts) // 4
    assert sum(counts[-quarter:]) > 2 * sum(counts[:quarter])
    assert min(counts) > 1


def test_a_seed_is_a_world():
    one, again, other = (corpus.make_world(seed) for seed in (3, 3, 4))
    assert one == again
    assert {f.answer for s in one for f in s.facts} != {f.answer for s in other for f in s.facts}


def test_tokenizer_keeps_the_text(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    assert tokenizer.eos_token == corpus.END
    for row in read(world / "corpus.jsonl")[:50]:
        ids = tokenizer(row["text"])["input_ids"]
        assert str(tokenizer.decode(ids)).strip() == row["text"]
        assert len(ids) < 1.5 * len(row["text"].split()) + row["text"].count(".") * 2
