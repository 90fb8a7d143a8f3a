"""Multiple choice: lettered options in a prompt, and the letter in an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decode.tasks.task import Example, Metric, Scored

LETTERS = "ABCDEFGHIJ"
ANSWER_PREFIX = "The answer is:"
# Markup that the published code deletes before it reads the first character.
_MARKUP = ("(", "\\begin{blockquote}", "\\begin{code}", "<blockquote>", " **", ">", "```\n")

# accuracy leaves out what names no option, as published; accuracy_of_all counts it as wrong.
METRICS = (
    Metric("accuracy"),
    Metric("accuracy_of_all"),
    Metric("invalid", higher_is_better=False),
)


def question_with_options(question: str, options: Sequence[str]) -> str:
    """The question and a line for each option."""
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines])


def extract_letter(text: str, letters: str) -> str:
    """The letter that a text begins with, markup aside; empty if it names none."""
    for markup in _MARKUP:
        text = text.replace(markup, "")
    first = text.lstrip()[:1]
    return first if first and first in letters else ""


def score_letter(example: Example, letter: str) -> Scored:
    """Compares a letter, or none, with the example's field `answer`."""
    right = float(letter == example.fields["answer"])
    return Scored(
        letter,
        {
            "accuracy": right if letter else None,
            "accuracy_of_all": right,
            "invalid": float(not letter),
        },
    )


def score_text(example: Example, text: str) -> Scored:
    """Compares the letter that a text begins with with the answer."""
    return score_letter(example, extract_letter(text, example.fields["letters"]))


def choose(example: Example, scores: Mapping[str, float]) -> Scored:
    """Answers with the letter of the highest score; the first of several.

    Args:
      scores: by letter, log-probabilities or logits; options that are absent are out.
    """
    offered = [letter for letter in example.fields["letters"] if letter in scores]
    return score_letter(example, max(offered, key=scores.__getitem__, default=""))
