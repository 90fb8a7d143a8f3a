"""What the host does around the engine changes no row: slots, chunks, order, resumption, draws."""

import dataclasses
import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import TopKLogitsWarper, TopPLogitsWarper

from decode import Generator, engine, scheduler
from decode.scheduler import longest_contexts, make_requests
from proxy_jax.errors import InputError
from tests import trios
from tests.trios import PROMPTS, STEPS, complete, options


def run(loaded, requests, whole=None, **fields):
    """Tokens by row, and the rows that each chunk finished."""
    generator = Generator(loaded, options(**fields))
    chunks = list(generator.stream(requests, longest_contexts(whole or requests)))
    tokens = {done.row: list(done.token_ids) for chunk in chunks for done in chunk}
    return tokens, [[done.row for done in chunk] for chunk in chunks]


def requests_of(loaded, prompts=PROMPTS, **fields):
    return make_requests(loaded.trio, options(**fields), prompts)


def chunks_of_a_full_batch(limits, batch, steps):
    """How many chunks run if every slot takes the next request as soon as a chunk ends."""
    free_at = [0] * batch
    for limit in limits:
        heapq.heappush(free_at, heapq.heappop(free_at) + -(-limit // steps))
    return max(free_at)


def test_freed_slots_are_refilled(loaded, expected):
    limits = [12, 1, 5, 2, 9, 12, 3, 4]
    requests = [
        dataclasses.replace(request, max_new_tokens=limit)
        for request, limit in zip(requests_of(loaded), limits, strict=True)
    ]
    tokens, chunks = run(loaded, requests)
    assert tokens == {row: expected[row][:limit] for row, limit in enumerate(limits)}
    assert len(chunks) == chunks_of_a_full_batch(limits, 4, 4) == 4
    assert chunks[0] == [1, 3]


def test_order_of_requests_changes_nothing(loaded, expected):
    requests = requests_of(loaded)
    tokens, _ = run(loaded, [requests[row] for row in (6, 2, 7, 0, 5, 1, 4, 3)])
    assert tokens == dict(enumerate(expected))


@pytest.mark.parametrize("plan", ["separate", "stacked"])
def test_samples_of_a_prompt_are_prefilled_once(llama, expected, plan, monkeypatch):
    """Also those that arrive while another is under way."""
    limits = [12, 4, 4, 4, 12, 4]
    prompts = [0, 0, 0, 0, 6, 6]
    loaded = llama.load(plan=plan)
    requests = requests_of(loaded, [PROMPTS[0]], samples=4) + requests_of(
        loaded, [PROMPTS[6]], samples=2
    )
    requests = [
        dataclasses.replace(request, row=row, max_new_tokens=limit)
        for row, (request, limit) in enumerate(zip(requests, limits, strict=True))
    ]
    prefilled = []
    real = engine.prefill

    def prefill(program, index, params, cache, tokens, lengths, slots):
        prefilled.append((index, int((slots < 4).sum())))
        return real(program, index, params, cache, tokens, lengths, slots)

    monkeypatch.setattr(engine, "prefill", prefill)
    tokens, _ = run(loaded, requests)
    assert tokens == {
        row: expected[prompt][:limit]
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    }
    rows = [sum(count for index, count in prefilled if index == i) for i in range(3)]
    assert rows == [2] * len(loaded.passes) + [0] * (3 - len(loaded.passes))


@pytest.fixture(scope="module")
def sampled(loaded):
    """Two samples a prompt at temperature 1.3."""
    fields = {"sampling": trios.sampling(1.3), "samples": 2, "seed": 11}
    return fields, run(loaded, requests_of(loaded, samples=2), **fields)[0]


def test_samples_do_not_depend_on_the_batch(loaded, sampled):
    """As when a killed job goes on with what is missing."""
    fields, tokens = sampled
    whole = requests_of(loaded, samples=2)
    assert [request.row for request in whole] == list(range(16))
    missing = [whole[row] for row in (13, 4, 15)]
    alone, _ = run(loaded, missing, whole, **fields)
    assert alone == {row: tokens[row] for row in (13, 4, 15)}
    in_other_chunks, _ = run(loaded, whole, **fields, chunk_steps=1)
    assert in_other_chunks == tokens


def test_samples_differ_between_rows_and_seeds(loaded, sampled):
    fields, tokens = sampled
    assert len({tuple(row) for row in tokens.values()}) == 16
    other, _ = run(loaded, requests_of(loaded, samples=2), **(fields | {"seed": 12}))
    assert all(other[row] != tokens[row] for row in tokens)


def test_draws_follow_the_documented_keys(llama, loaded):
    """key(seed) folded with the row, then with the token's position in M's context."""
    temperature, k, p = 1.4, 20, 0.8
    prompts = PROMPTS[:3]
    tokens = complete(
        loaded, prompts, sampling=trios.sampling(temperature, top_k=k, top_p=p), samples=2, seed=5
    )
    key = jax.random.key(5)
    for row in range(6):
        ids = llama.ids(prompts[row // 2])

        def drawn(context, scores, row=row):
            scores = np.where(llama.valid, scores, -np.inf) / temperature
            scores = trios.warp(TopPLogitsWarper(p), trios.warp(TopKLogitsWarper(k), scores))
            at = jax.random.fold_in(jax.random.fold_in(key, row), len(context))
            chosen = jax.random.categorical(at, jnp.asarray(scores, jnp.float32))
            return np.where(np.arange(len(scores)) == chosen, 0.0, -np.inf)

        assert tokens[row] == llama.greedy(ids, STEPS, change=drawn), row


def test_prompts_longer_than_a_cache_grain(llama, loaded):
    """Their padded length must not outgrow the cache."""
    prompts = ["é ü ß " * 48, "é ü ß " * 24, "A"]
    lengths = [len(llama.ids(prompt)["base"]) for prompt in prompts]
    assert 256 < lengths[0] < 380  # a bucket of 512, a cache of 384
    assert 128 < lengths[1] < 250
    answers = [llama.greedy(llama.ids(prompt), 3) for prompt in prompts]
    assert complete(loaded, prompts, max_new_tokens=3) == answers


def test_prompts_that_are_refused(loaded):
    refused: list[tuple[Any, Any, dict[str, Any], str]] = [
        ("The capital", None, {}, "prompts must be a list of prompts, not one alone"),
        (["A", 5], None, {}, "prompt 1: must be a string or a Prompt, not 5"),
        (["A", "\ud800"], None, {}, "prompt 1: not valid Unicode"),
        (["A", "B"], [1.0], {}, "1 alphas for 2 prompts"),
        (["A"] * 5, None, {"samples": 2**20}, "1048576 samples of 5 prompts are more than"),
        (["A"], None, {"eos_ids": (320,)}, "eos_ids: 320 is not one of the 320 ids of M"),
    ]
    for prompts, alpha, fields, message in refused:
        with pytest.raises(InputError, match=message):
            make_requests(loaded.trio, options(**fields), prompts, alpha)
    with pytest.raises(InputError, match="eos_ids: 320"):
        Generator(loaded, options(eos_ids=(320,)))


def test_no_prompts(loaded):
    assert complete(loaded, []) == []


@pytest.mark.parametrize(("row", "role"), [(1, "expert"), (5, "base")])
def test_nan_names_row_and_model(llama, loaded, expected, row, role):
    """A broken weight is met only by the one prompt that holds its token."""
    prompts = [llama.ids(prompt)[role] for prompt in PROMPTS]
    elsewhere = {token for other in [*prompts[:row], *prompts[row + 1 :]] for token in other}
    token = min(set(prompts[row]) - elsewhere - {token for new in expected for token in new})
    params = list(loaded.params)
    index = list(loaded.trio.roles).index(role)
    broken = np.asarray(params[index]["embedding"]).copy()
    broken[token] = np.nan
    params[index] = {**params[index], "embedding": broken}
    loaded = dataclasses.replace(loaded, params=tuple(params))
    with pytest.raises(InputError, match=f"row {row}: the logits of the {role} model"):
        complete(loaded)


def compiled():
    functions: tuple[Any, ...] = (engine.new_state, engine.prefill, engine.admit, engine.chunk)
    return [function._cache_size() for function in functions]


def test_new_values_do_not_recompile(loaded):
    fields: dict[str, Any] = {"sampling": trios.sampling(0.7, top_p=0.9), "beta": 1.1}
    complete(loaded, **fields)
    before = compiled()
    complete(loaded, alphas=[0.3 * row for row in range(8)], **fields)
    complete(loaded, sampling=trios.sampling(1.9, top_p=0.4), beta=0.5, seed=9)
    complete(loaded, PROMPTS[::-1], samples=2, **fields)
    assert compiled() == before


def test_buckets(loaded, expected, monkeypatch):
    """Shorter ones than the other tests have, as in earnest: padding changes nothing."""
    monkeypatch.setattr(scheduler, "_SHORTEST_BUCKET", 8)
    lengths = [1, 8, 9, 16, 17, 100, 128, 129]
    assert [scheduler.bucket(n) for n in lengths] == [8, 8, 16, 16, 32, 128, 128, 256]
    assert complete(loaded) == expected


def test_one_prefill_a_bucket_and_pass(loaded):
    """Prompts of 2 to 100 tokens, in ever other batches: three buckets, three models."""
    longest = "A" * 60
    complete(loaded, [longest, "A" * 40, "A"])
    before = compiled()
    for length in range(2, 60, 5):
        complete(loaded, [longest, "A" * length, "A" * (60 - length)])
    assert compiled() == before
