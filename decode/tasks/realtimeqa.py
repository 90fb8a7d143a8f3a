"""RealTimeQA: multiple-choice questions about the news of a week (Kasai et al. 2023).

In the published experiment M is a black box that gives the five most likely first tokens; the
offset is added to the option letters among them, and the highest wins. A question with no letter
among them is left out. `choose` does that from scores of letters; a text counts by its first
letter. The paper does not give its prompt: both forms are worded like TruthfulQA's here, and
differ in what chat models read.
"""

from __future__ import annotations

from decode.tasks import choices
from decode.tasks.task import (
    NO_CHAT,
    OWN_CHAT,
    Decoding,
    Example,
    Form,
    Task,
    one_by_one,
)
from proxy_jax.errors import InputError
from proxy_jax.reading import shown
from proxy_jax.rows import Row, read_rows
from proxy_jax.tokenization import Prompt


def load(location: str = "", form: Form = "published") -> Task:
    """The task; its data is JSON lines of the official fields.

    question_id, question, choices, and answer, the index of the right choice in a list.

    Raises:
      InputError: data that cannot be used.
    """
    rows = read_rows(location, None)
    return Task(
        name="realtimeqa",
        form=form,
        examples=tuple(_example(row) for row in rows),
        templates=NO_CHAT if form == "published" else OWN_CHAT,
        decoding=Decoding(max_new_tokens=1),
        metrics=choices.METRICS,
        score=one_by_one(choices.score_text),
        choose=choices.choose,
    )


def _example(row: Row) -> Example:
    question = row.text("question").strip()
    # Some rows have an empty last choice.
    options = [option.strip() for option in row.texts("choices")]
    while options and not options[-1]:
        options.pop()
    if len(options) > len(choices.LETTERS):
        raise InputError(
            f"{row.where}: {len(options)} choices are more than the {len(choices.LETTERS)} letters"
        )
    letters = choices.LETTERS[: len(options)]
    answer = row.field("answer")
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    indices = [str(i) for i in range(len(options))]
    if not isinstance(answer, str | int) or str(answer) not in indices:
        raise InputError(
            f"{row.where}: answer must be the index of one of {len(options)} choices, "
            f"not {shown(answer)}"
        )
    right = letters[indices.index(str(answer))]
    text = choices.question_with_options(question, options)
    prompt = Prompt(f"{text}\n\n", response_prefix=choices.ANSWER_PREFIX)
    fields = {"question": question, "letters": letters, "answer": right}
    return Example(row.text("question_id"), prompt, prompt, fields)
