"""TriviaQA: short answers from memory (Joshi et al. 2017), the unfiltered development questions.

The published experiment tunes the expert on the task, and prompts no model as a chat model. A text
is right if it is one of the answer's aliases, spaces around it and case aside.
"""

from __future__ import annotations

from decode.tasks.task import (
    NO_CHAT,
    OWN_CHAT,
    Decoding,
    Example,
    Form,
    Metric,
    Scored,
    Task,
    example_id,
    one_by_one,
)
from proxy_jax.errors import InputError
from proxy_jax.rows import Hub, Row, read_rows
from proxy_jax.tokenization import Prompt

_HUB = Hub("mandarjoshi/trivia_qa", "unfiltered.nocontext", "validation")


def load(location: str = "", form: Form = "published") -> Task:
    """The task; its data is the official unfiltered-web-dev.json.

    Or rows of question, answers (a list) and question_id. The prompts are those that experts are
    trained on, in both forms; the clean one uses the chat template of chat models.

    Raises:
      InputError: data that cannot be used.
    """
    rows = read_rows(location, _HUB)
    return Task(
        name="triviaqa",
        form=form,
        examples=tuple(_example(i, row) for i, row in enumerate(rows)),
        templates=NO_CHAT if form == "published" else OWN_CHAT,
        decoding=Decoding(max_new_tokens=20, stop=("\n",)),
        metrics=(Metric("exact_match"),),
        score=one_by_one(score),
    )


def score(example: Example, text: str) -> Scored:
    """Looks a text up among the aliases."""
    aliases = {alias.strip().lower() for alias in example.fields["answers"]}
    return Scored(text.strip(), {"exact_match": float(text.strip().lower() in aliases)})


def _example(index: int, row: Row) -> Example:
    question = row.text("question", "Question").strip()
    if "answers" in row.fields:
        answers = row.texts("answers")
    else:
        answers = row.part("answer", "Answer").texts("aliases", "Aliases")
    prompt = Prompt(f"Question: {question}\n", response_prefix="Answer:")
    if not any(answer.strip() for answer in answers):
        raise InputError(f"{row.where}: answers are all empty")
    name = example_id(row, "question_id", "QuestionId", default=index)
    return Example(name, prompt, prompt, {"question": question, "answers": answers})
