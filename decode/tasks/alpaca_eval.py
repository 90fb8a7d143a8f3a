"""AlpacaFarm's instructions, compared with text-davinci-003 (Dubois et al. 2023, AlpacaEval).

The published judge is alpaca-eval 0.3.1 with its annotator alpaca_eval_gpt4_0314 (OpenAI's). Any
judge that says how far it prefers a text to the reference (1, 0, or 0.5 for a draw) can be plugged
in (judges.py); the instruction and the reference are in the example's fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decode.tasks.task import (
    OWN_CHAT,
    PUBLISHED_CHAT,
    Decoding,
    Example,
    Form,
    Judging,
    Metric,
    Scored,
    Task,
)
from proxy_jax.rows import Hub, Row, read_rows
from proxy_jax.tokenization import Prompt

_HUB = Hub("hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json")


def load(location: str = "", form: Form = "published") -> Task:
    """The task; its data is the official alpaca_eval.json.

    The instruction is the prompt in both forms.

    Raises:
      InputError: data that cannot be used.
    """
    rows = read_rows(location, _HUB)
    return Task(
        name="alpaca_eval",
        form=form,
        examples=tuple(_example(i, row) for i, row in enumerate(rows)),
        templates=PUBLISHED_CHAT if form == "published" else OWN_CHAT,
        decoding=Decoding(max_new_tokens=2048, stop=("\n\nComment:",)),
        metrics=(
            Metric("win_rate"),
            Metric("draw_rate", higher_is_better=None),
            Metric("characters", higher_is_better=None, share=False),
        ),
        score=score,
        judging=Judging(("preference",), _verdict),
    )


def score(examples: Sequence[Example], texts: Sequence[str]) -> list[Scored]:
    """All that can be said without a judge: how long the texts are."""
    return [Scored(text, {"characters": float(len(text))}) for text in texts]


def _verdict(said: Mapping[str, float]) -> dict[str, float]:
    preference = said["preference"]
    return {"win_rate": preference, "draw_rate": float(preference == 0.5)}


def _example(index: int, row: Row) -> Example:
    prompt = Prompt(row.text("instruction"))
    fields = {
        "instruction": prompt.text,
        "reference": row.text("output", empty=True),
        "dataset": row.string("dataset", default=None),
    }
    return Example(str(index), prompt, prompt, fields)
