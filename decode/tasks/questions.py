"""Questions of your own, answered in so many words: rows {prompt, completion}, as train.sft reads.

A text is right if it is the completion, spaces around both aside.
"""

from __future__ import annotations

from decode.tasks.task import NO_CHAT, Decoding, Example, Form, Metric, Scored, Task, one_by_one
from proxy_jax.rows import Row, read_rows
from proxy_jax.tokenization import Prompt


def load(location: str = "", form: Form = "published") -> Task:
    """The task; both forms are the prompts as they are.

    Raises:
      InputError: data that cannot be used.
    """
    return Task(
        name="questions",
        form=form,
        examples=tuple(_example(i, row) for i, row in enumerate(read_rows(location, hub=None))),
        templates=NO_CHAT,
        decoding=Decoding(max_new_tokens=64),
        metrics=(Metric("exact_match"),),
        score=one_by_one(score),
    )


def score(example: Example, text: str) -> Scored:
    """Compares a text with the completion."""
    return Scored(text.strip(), {"exact_match": float(text.strip() == example.fields["answer"])})


def _example(index: int, row: Row) -> Example:
    prompt = Prompt(row.text("prompt"))
    return Example(str(index), prompt, prompt, {"answer": row.text("completion").strip()})
