"""Greedy decoding draws the tokens of a slow loop over the transformers models.

The loop (tests/trios.py) reads each context anew at every step, one row at a time.
"""

from typing import Any

import numpy as np
import pytest
from transformers import MinPLogitsWarper, TopPLogitsWarper

from decode import Truncation
from proxy_jax.errors import InputError
from proxy_jax.trio import load_trio
from tests import trios
from tests.trios import PROMPTS, STEPS, complete


def test_three_families_with_moved_ids(mixed):
    """Sliding window, biases, tied head; M+ has fewer rows than M and another prompt."""
    ids = [mixed.ids(prompt) for prompt in PROMPTS]
    assert len({len(one["base"]) for one in ids}) > 4
    assert all(one["base"] == one["antiexpert"] != one["expert"] for one in ids)
    answers = [mixed.greedy(one, STEPS) for one in ids]
    assert complete(mixed.load()) == answers
    everywhere = lambda s, step: s["base"] + s["expert"] - s["antiexpert"]  # noqa: E731
    assert [mixed.greedy(one, STEPS, everywhere) for one in ids] != answers


@pytest.mark.parametrize(
    ("plan", "stacked_layers"),
    [("separate", False), ("stacked", False), ("separate", True), ("stacked", True)],
)
def test_plans_and_scanned_layers(llama, expected, plan, stacked_layers):
    assert complete(llama.load(plan=plan, stacked_layers=stacked_layers)) == expected


@pytest.mark.parametrize(("batch_size", "chunk_steps"), [(1, 16), (8, 3), (3, 1)])
def test_batch_and_chunk_size_change_nothing(loaded, expected, batch_size, chunk_steps):
    assert complete(loaded, batch_size=batch_size, chunk_steps=chunk_steps) == expected


def test_alpha_of_each_row(llama, loaded, expected):
    alphas = [1.0, 0.0, -0.7, 0.3, 2.5, 1.0, 0.5, -2.0]
    answers = [
        llama.greedy(llama.ids(prompt), STEPS, llama.shifted(alpha))
        for prompt, alpha in zip(PROMPTS, alphas, strict=True)
    ]
    assert complete(loaded, alphas=alphas) == answers
    changed = [a != b for a, b in zip(answers, expected, strict=True)]
    assert changed == [alpha != 1.0 for alpha in alphas]


def test_alpha_schedules(llama, loaded):
    schedules: list[Any] = [((0, 0.0), (3, 1.5), (7, -0.5)), ((0, 1.0),), 0.5, ((0, 2.0), (1, 0.0))]
    values = [
        lambda step: (0.0, 1.5, -0.5)[(step >= 3) + (step >= 7)],
        lambda step: 1.0,
        lambda step: 0.5,
        lambda step: 2.0 if step == 0 else 0.0,
    ]
    answers = [
        llama.greedy(llama.ids(prompt), STEPS, llama.shifted(value))
        for prompt, value in zip(PROMPTS, values, strict=False)
    ]
    assert complete(loaded, PROMPTS[:4], alphas=schedules) == answers


def test_alpha_0_is_the_base_alone(llama, loaded):
    alone = [
        llama.greedy({"base": llama.ids(prompt)["base"]}, STEPS, lambda s, step: s["base"])
        for prompt in PROMPTS
    ]
    assert complete(loaded, alpha=0.0) == alone
    assert complete(llama.load(("base",))) == alone


def test_equal_base_and_antiexpert_give_the_expert(llama):
    """The same checkpoint in both roles: what is left is M+, reading its own prompt."""
    base = llama.spec("base")
    answers = [
        llama.greedy(
            {r: llama.ids(p)[r] for r in ("base", "expert")}, STEPS, lambda s, _: s["expert"]
        )
        for p in PROMPTS
    ]
    assert complete(load_trio(base, llama.spec("expert"), base)) == answers


@pytest.mark.parametrize(
    ("roles", "formula"),
    [
        (("base", "expert"), lambda s, _: s["base"] + 0.6 * (s["expert"] - s["base"])),
        (("base", "antiexpert"), lambda s, _: s["base"] + 0.6 * (s["base"] - s["antiexpert"])),
    ],
    ids=["no antiexpert", "no expert"],
)
def test_absent_role_reads_as_the_base(llama, roles, formula):
    answers = [
        llama.greedy({role: llama.ids(p)[role] for role in roles}, STEPS, formula) for p in PROMPTS
    ]
    assert complete(llama.load(roles), alpha=0.6) == answers


def test_scale_form(llama, loaded):
    alpha, beta = 0.7, 1.6

    def scaled(s, _):
        minus = s["antiexpert"]
        shift = minus + alpha * (s["expert"] - minus) + beta * (s["base"] - minus)
        return np.where(llama.shared, shift, s["base"])

    answers = [llama.greedy(llama.ids(p), STEPS, scaled) for p in PROMPTS]
    assert complete(loaded, alpha=alpha, beta=beta) == answers


@pytest.mark.parametrize(
    ("truncation", "warper"),
    [
        (Truncation(top_p=0.4), TopPLogitsWarper(0.4)),
        (Truncation(min_p=0.3), MinPLogitsWarper(0.3)),
    ],
    ids=["top_p", "min_p"],
)
def test_base_filter(llama, loaded, expected, truncation, warper):
    def filtered(s, step):
        allowed = trios.warp(warper, np.where(llama.valid, s["base"], -np.inf))
        return np.where(np.isfinite(allowed), llama.shifted(1.0)(s, step), -np.inf)

    answers = [llama.greedy(llama.ids(p), STEPS, filtered) for p in PROMPTS]
    assert answers != expected
    assert complete(loaded, base_filter=truncation) == answers


def test_padding_rows_are_never_drawn(llama, loaded, expected):
    """They have the highest logits of every model."""
    ids = llama.ids(PROMPTS[0])
    assert all(np.argmax(llama.scores(role, ids[role])) >= trios.TOKENS for role in ids)
    sampled = complete(loaded, sampling=trios.sampling(2.0))
    assert max(token for row in [*expected, *sampled] for token in row) < trios.TOKENS


def test_stacked_plan_needs_one_shape(mixed):
    with pytest.raises(InputError, match=r"plan 'stacked' needs .* of one shape"):
        mixed.load(plan="stacked")
