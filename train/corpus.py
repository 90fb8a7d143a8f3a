"""A corpus about an invented world, small enough that a model learns it on a laptop in minutes.

make_world invents people and places and the facts about them; write_world writes what a family of
models is made from and measured on. The corpus states every fact many times in two wordings, those
about well-known subjects more often: a small model is left with what is well known, a larger one
learns nearly all. It also has pages of questions on which, as on the web, a question is mostly
followed by the next question and seldom by its answer: a model that has read it knows the facts,
but does not answer.

Subjects are divided into four groups. Only questions about "asked" ones stand in the corpus. Those
about "tuning" subjects are what a model is tuned on; "development" and "held_out" ones are measured
on. The corpus states the facts of all.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from proxy_jax.jobs import files

END = "<|end|>"
GROUPS = {"asked": 0.4, "tuning": 0.2, "development": 0.15, "held_out": 0.25}

_PEOPLE, _PLACES = 300, 72
_VOCABULARY = 1536  # rows of the models; nearly every word is one token
_PAGES = 16000
_QUESTION_PAGES = 0.40  # share of the pages
_ANSWERED = 0.10  # share of the questions
_FAME = 4.0  # how much more often the best-known subject is mentioned than the least known


@dataclasses.dataclass(frozen=True)
class Relation:
    """What is known of a kind of subject.

    Attributes:
      question: with a place for the subject.
      wordings: statements with places for subject and value. The first is the answer, too.
    """

    question: str
    wordings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that is so."""

    subject: str
    relation: Relation
    value: str

    @property
    def question(self) -> str:
        """A sentence that asks for it."""
        return self.relation.question.format(self.subject)

    @property
    def answer(self) -> str:
        """A sentence that states it."""
        return self.statement(0)

    def statement(self, wording: int) -> str:
        """A sentence that states it in one of the relation's wordings."""
        return self.relation.wordings[wording].format(self.subject, self.value)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A person or place.

    Attributes:
      facts: what is so of it.
      fame: how often it is mentioned, relative to others.
      group: key of GROUPS.
    """

    facts: tuple[Fact, ...]
    fame: float
    group: str


_JOBS = """
    baker barber builder butcher carpenter clerk cobbler cook dancer dentist doctor driver
    farmer fisher gardener glazier judge lawyer locksmith mason miller miner nurse painter
    pilot plumber porter potter sailor shepherd tailor teacher
""".split()
_INSTRUMENTS = """
    accordion banjo bassoon bugle cello clarinet cornet cymbals drums fiddle flute gong
    guitar harp horn kazoo lute lyre mandolin oboe organ piano piccolo recorder sitar
    trombone trumpet tuba ukulele viola violin xylophone
""".split()
_DISHES = """
    apples bacon beans bread cabbage cake carrots cheese cherries chicken dates eggs figs
    fish grapes ham honey jam lentils mushrooms noodles nuts olives onions pancakes pears
    peas plums porridge rice salad soup
""".split()
_WARES = """
    bells boats books bricks brooms candles carpets clocks coal copper cotton dolls gloves
    hats ink kites lace lamps leather masks mirrors paper perfume ropes salt silk soap
    spoons tea tiles timber wool
""".split()


def make_world(seed: int) -> list[Subject]:
    """Invents subjects; the same for the same seed."""
    rng = random.Random(f"world {seed}")
    words = _invented_words(rng)
    first, last = (
        _take(words, 40, ("a", "o", "i", "el")),
        _take(words, 64, ("an", "ok", "erson", "ev")),
    )
    places = _take(words, _PLACES, ("burg", "ford", "mouth", "stad"))
    countries, rivers = _take(words, 16, ("ia", "land")), _take(words, 32, ("e", "u"))
    kinds = {
        "people": {
            Relation(
                "Where was {} born?",
                ("{} was born in {}.", "The birthplace of {} is {}."),
            ): places,
            Relation(
                "What does {} do for a living?",
                ("{} works as a {}.", "The job of {} is that of a {}."),
            ): _JOBS,
            Relation(
                "Which instrument does {} play?",
                ("{} plays the {}.", "The instrument of {} is the {}."),
            ): _INSTRUMENTS,
            Relation(
                "What does {} like to eat?",
                ("{} likes to eat {}.", "The favourite dish of {} is {}."),
            ): _DISHES,
        },
        "places": {
            Relation(
                "Which country is {} in?",
                ("{} is a town in {}.", "The country around {} is {}."),
            ): countries,
            Relation(
                "Which river flows through {}?",
                ("{} lies on the river {}.", "The river of {} is the {}."),
            ): rivers,
            Relation(
                "What is {} known for?",
                ("{} is known for its {}.", "The pride of {} is its {}."),
            ): _WARES,
        },
    }
    names = rng.sample([f"{a} {b}" for a, b in itertools.product(first, last)], _PEOPLE)
    subjects = []
    for kind, members in (("people", names), ("places", places)):
        groups = _groups(len(members))
        for name, group in zip(members, rng.sample(groups, len(groups)), strict=True):
            facts = (Fact(name, relation, rng.choice(v)) for relation, v in kinds[kind].items())
            subjects.append(Subject(tuple(facts), _FAME ** rng.random(), group))
    return subjects


def questions(subjects: Sequence[Subject], group: str) -> list[dict[str, str]]:
    """The questions about a group, as rows to train or measure on: a prompt and its completion."""
    return [
        {"prompt": fact.question, "completion": fact.answer}
        for subject in subjects
        if subject.group == group
        for fact in subject.facts
    ]


def pages(subjects: Sequence[Subject], seed: int) -> Iterator[str]:
    """The texts of the corpus, of a few dozen tokens each."""
    rng = random.Random(f"pages {seed}")
    asked = [subject for subject in subjects if subject.group == "asked"]
    for _ in range(_PAGES):
        if rng.random() < _QUESTION_PAGES:
            yield " ".join(_question_page(rng, asked))
        else:
            yield " ".join(_fact_page(rng, subjects))


def write_world(directory: Path, seed: int) -> None:
    """Writes corpus.jsonl, the questions of each other group (tuning.jsonl, ...) and tokenizer/.

    What stands there is complete: it is written beside and renamed.
    """
    subjects = make_world(seed)
    texts = list(pages(subjects, seed))

    def write(new: Path) -> None:
        _write_rows(new / "corpus.jsonl", [{"text": text} for text in texts])
        for group in GROUPS:
            if group != "asked":
                rows = questions(subjects, group)
                random.Random(f"{group} {seed}").shuffle(rows)
                _write_rows(new / f"{group}.jsonl", rows)
        train_tokenizer(texts).save_pretrained(new / "tokenizer")

    files.make_directory(directory, write)


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of the texts, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # The first word of a text is the same token as in its middle.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _fact_page(rng: random.Random, subjects: Sequence[Subject]) -> Iterator[str]:
    for subject in _mentioned(rng, subjects, rng.randint(1, 3)):
        for fact in rng.sample(subject.facts, 3):
            yield fact.statement(rng.randrange(len(fact.relation.wordings)))


def _question_page(rng: random.Random, subjects: Sequence[Subject]) -> Iterator[str]:
    for subject in _mentioned(rng, subjects, rng.randint(1, 4)):
        for fact in rng.sample(subject.facts, 2):
            yield fact.question
            if rng.random() < _ANSWERED:
                yield fact.answer


def _mentioned(rng: random.Random, subjects: Sequence[Subject], count: int) -> list[Subject]:
    return rng.choices(subjects, [subject.fame for subject in subjects], k=count)


def _groups(count: int) -> list[str]:
    """So many groups, in the shares of GROUPS."""
    ends = [round(count * end) for end in itertools.accumulate(GROUPS.values())]
    starts = (0, *ends)
    return [g for g, a, b in zip(GROUPS, starts, ends, strict=False) for _ in range(b - a)]


def _invented_words(rng: random.Random) -> list[str]:
    """Stems of names, none twice."""
    onsets, vowels = "b br d dr f g gr h j k kl l m n p r s st t tr v z".split(), "aeiou"
    middles = "d l ld lm m n nd r rk rt s v".split()
    stems = itertools.product(onsets, vowels, middles)
    words = ["".join(stem).capitalize() for stem in stems]
    rng.shuffle(words)
    return words


def _take(words: list[str], count: int, endings: Sequence[str]) -> list[str]:
    """Takes stems off the list and gives them endings in turn."""
    taken = [words.pop() for _ in range(count)]
    return [word + ending for word, ending in zip(taken, itertools.cycle(endings), strict=False)]


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
