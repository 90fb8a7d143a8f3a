"""GSM8K: grade-school mathematics, answered in words that end in a number (Cobbe et al. 2021).

published: an instruction line before the question. clean: the question alone, as train.convert
writes it for experts; the published task experts are trained on that and evaluated on the other.

The answer is the last number of the text. exact_match is the published metric: equality of strings
without punctuation, to which "18.00" is 1800 and no answer to "18". numeric_match is equality of
numbers. The published extraction reads no sign before an integer.
"""

from __future__ import annotations

import math
import re
import string

from decode.tasks.task import (
    OWN_CHAT,
    PUBLISHED_CHAT,
    Decoding,
    Example,
    Form,
    Metric,
    Scored,
    Task,
    one_by_one,
)
from proxy_jax.errors import InputError
from proxy_jax.rows import Hub, Row, read_rows
from proxy_jax.tokenization import Prompt

_HUB = Hub("openai/gsm8k", "main")
_INSTRUCTION = "Answer the following question."
# A model that goes on with another question has answered this one.
_NEXT = ("Answer the following question", "Question:", "Comment:")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def load(location: str = "", form: Form = "published") -> Task:
    """The task; its data is the official test.jsonl.

    Raises:
      InputError: data that cannot be used.
    """
    published = form == "published"
    rows = read_rows(location, _HUB)
    return Task(
        name="gsm",
        form=form,
        examples=tuple(_example(i, row, published) for i, row in enumerate(rows)),
        templates=PUBLISHED_CHAT if published else OWN_CHAT,
        # What follows a stop string never counted, so the clean form does not generate it.
        decoding=Decoding(max_new_tokens=512, stop=() if published else _NEXT),
        metrics=(Metric("exact_match"), Metric("numeric_match")),
        score=one_by_one(score),
    )


def extract(text: str) -> str:
    """The last number before the model goes on with another question; without one, that text."""
    text = text[: min((at for at in map(text.find, _NEXT) if at >= 0), default=len(text))]
    numbers = _NUMBER.findall(re.sub(r"(\d),(\d)", r"\1\2", text))
    return numbers[-1] if numbers else text


def score(example: Example, text: str) -> Scored:
    """Compares the last number of a text with the answer."""
    found, answer = extract(text), example.fields["answer"]
    return Scored(
        found,
        {
            "exact_match": float(_bare(found) == _bare(answer)),
            "numeric_match": float(_number(found) == _number(answer)),
        },
    )


def _example(index: int, row: Row, published: bool) -> Example:
    question = row.text("question").strip()
    rationale, mark, answer = row.text("answer").rpartition("####")
    answer = answer.strip().replace(",", "")
    number = _number(answer)
    if not mark or number is None or not math.isfinite(number):
        raise InputError(f"{row.where}: answer does not end in '#### ' and a number")
    text = f"Question: {question}"
    if published:
        text = f"{_INSTRUCTION}\n\n{text}"
    prompt = Prompt(f"{text}\n", response_prefix="Answer:")
    chat_prompt = Prompt(text, response_prefix=" Answer:")
    fields = {"question": question, "answer": answer, "rationale": rationale.strip()}
    return Example(str(index), prompt, chat_prompt, fields)


def _bare(text: str) -> str:
    return text.lower().translate(_PUNCTUATION)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
