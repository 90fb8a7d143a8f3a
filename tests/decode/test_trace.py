"""What is recorded of each step equals NumPy's figures in float64 from the torch models' logits.

The torch models read every context anew (tests/trios.py), with the tokens that the engine drew.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from decode import Generator, Truncation, engine, generate
from decode.outputs import OutputFile
from decode.scheduler import longest_contexts, make_requests
from decode.trace import ALTERNATIVES, Trace
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import load_trio
from tests import trios
from tests.decode import jobs
from tests.trios import PROMPTS, options


def recorded(loaded, prompts=PROMPTS, alphas=None, **fields):
    return Generator(loaded, options(**fields, trace=True)).generate(prompts, alphas)


def softmax_log(scores):
    return scores - np.logaddexp.reduce(scores)


def figures(trio, completion, prompt, combine, roles):
    """The figures of a completion by name, each of its arrays in the shape of Trace."""
    new, ids = completion.token_ids, trio.ids(prompt)
    found: dict[str, list[Any]] = {field: [] for field in FIELDS}
    for t, token in enumerate(new):
        scores = {r: trio.fitted(r, [*ids[r], *new[:t]]).astype(np.float64) for r in roles}
        combined = np.where(trio.valid, combine(scores, t), -np.inf)
        there = {"base": trio.valid, "expert": trio.shared, "antiexpert": trio.shared}
        all_scores = {"proxy": combined} | {
            role: np.where(there[role], s, -np.inf) for role, s in scores.items()
        }
        logs = {name: softmax_log(s) for name, s in all_scores.items()}
        orders = [np.argsort(-s, kind="stable") for s in all_scores.values()]
        found["log_probs"].append([log[token] for log in logs.values()])
        found["ranks"].append([order.tolist().index(token) for order in orders])
        found["entropies"].append(
            [-sum(np.exp(x) * x for x in log if np.isfinite(x)) for log in logs.values()]
        )
        top = [order[:ALTERNATIVES] for order in orders]
        found["top_ids"].append(top)
        found["top_log_probs"].append([log[o] for log, o in zip(logs.values(), top, strict=True)])
        p, q = np.exp(logs["proxy"]), np.exp(logs["base"])
        some = p > 0
        found["kl"].append(np.sum(p[some] * np.log(p[some] / q[some])))
        if "expert" in logs:
            found["overlap"].append(np.minimum(p, np.exp(logs["expert"])).sum())
    return {field: np.asarray(values) for field, values in found.items() if values}


FIELDS = [field.name for field in dataclasses.fields(Trace) if field.name != "names"]


def agree(trio, completions, prompts=PROMPTS, combine=None, roles=trios.ROLES):
    assert len(completions) == len(prompts)
    for completion, prompt in zip(completions, prompts, strict=True):
        trace = completion.trace
        assert trace.names == ("proxy", *roles)
        answer = figures(trio, completion, prompt, combine or trio.shifted(1.0), roles)
        assert ("overlap" in answer) == (trace.overlap is not None)
        for field, values in answer.items():
            own = getattr(trace, field)
            assert own.shape == values.shape, field
            if field in ("ranks", "top_ids"):
                np.testing.assert_array_equal(own, values, field)
            else:
                np.testing.assert_allclose(own, values, atol=1e-4, rtol=1e-4, err_msg=field)


def tokens_of(completions):
    return [list(completion.token_ids) for completion in completions]


@pytest.fixture(scope="module")
def traced(loaded):
    return recorded(loaded)


def test_three_models(llama, traced, expected):
    """And the tokens are those of a program that records nothing."""
    assert tokens_of(traced) == expected
    agree(llama, traced)
    ranks = np.concatenate([completion.trace.ranks for completion in traced])
    assert (ranks[:, 0] == 0).all()
    assert ranks[:, 1:].max() > 250


def test_stacked_on_eight_devices(llama, expected):
    place = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    loaded = llama.load(plan="stacked", place=place, stacked_layers=True)
    completions = recorded(loaded)
    assert tokens_of(completions) == expected
    agree(llama, completions)


def test_shared_weights(llama):
    """M+ is M- that reads another prompt."""
    small = llama.spec("antiexpert")
    expert = dataclasses.replace(small, template=llama.templates["expert"])
    loaded = load_trio(llama.spec("base"), expert, small, plan="shared")
    models = {**llama.models, "expert": llama.models["antiexpert"]}
    agree(dataclasses.replace(llama, models=models), recorded(loaded, PROMPTS[:4]), PROMPTS[:4])


def test_moved_ids(mixed):
    """Ids that are other tokens for M+ or M- have no probability there."""
    completions = recorded(mixed.load(), alpha=0.2)
    agree(mixed, completions, combine=mixed.shifted(0.2))
    outside = [np.isneginf(completion.trace.log_probs) for completion in completions]
    drawn = np.concatenate(outside).any(axis=0)
    assert drawn.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("roles", "combine"),
    [
        (("base",), lambda s, _: s["base"]),
        (("base", "antiexpert"), lambda s, _: 2 * s["base"] - s["antiexpert"]),
    ],
    ids=["M alone", "no expert"],
)
def test_absent_roles(llama, roles, combine):
    completions = recorded(llama.load(roles), PROMPTS[:4])
    agree(llama, completions, PROMPTS[:4], combine, roles)
    if roles == ("base",):
        assert not any(completion.trace.changed.any() for completion in completions)
        assert not any(completion.trace.kl.any() for completion in completions)


def test_sampled_and_constrained(llama, loaded):
    """The figures are those before temperature, truncation, bans and penalties."""
    fields: dict[str, Any] = {
        "sampling": trios.sampling(1.5, top_k=30, top_p=0.9),
        "seed": 3,
        "repetition_penalty": 1.7,
        "banned_tokens": ("e",),
        "base_filter": Truncation(min_p=0.02),
    }
    completions = recorded(loaded, PROMPTS[:4], [1.0, 0.5, -0.7, 1.0], **fields)
    assert tokens_of(completions) == trios.complete(
        loaded, PROMPTS[:4], [1.0, 0.5, -0.7, 1.0], **fields
    )

    def filtered(alpha):
        def combine(scores, step):
            base = np.where(llama.valid, scores["base"], -np.inf)
            kept = base >= base.max() + np.log(0.02)
            return np.where(kept, llama.shifted(alpha)(scores, step), -np.inf)

        return combine

    for completion, prompt, alpha in zip(completions, PROMPTS, [1.0, 0.5, -0.7, 1.0], strict=False):
        agree(llama, [completion], [prompt], filtered(alpha))
    assert max(completion.trace.ranks[:, 0].max() for completion in completions) > 3
    fewer = [np.isneginf(completion.trace.top_log_probs[:, 0]) for completion in completions]
    assert np.concatenate(fewer).any(), "the filter left fewer than five tokens"


def test_other_batches_and_chunks(loaded, traced):
    """Rows that wait, chunks that do not fit, other neighbours."""
    requests = make_requests(loaded.trio, options(), PROMPTS)
    generator = Generator(loaded, options(trace=True, batch_size=3, chunk_steps=5))
    order = [requests[row] for row in (6, 2, 7, 0, 5)]
    for chunk in generator.stream(order, longest_contexts(requests)):
        for done in chunk:
            assert_close(done.trace, traced[done.row].trace)


def assert_close(one, other):
    assert one.names == other.names
    for field in FIELDS:
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-5)


def test_the_rest_of_a_job_is_the_same(loaded, traced):
    """To the last bit: as when a killed job goes on with what is missing."""
    requests = make_requests(loaded.trio, options(), PROMPTS)
    generator = Generator(loaded, options(trace=True))
    missing = [requests[row] for row in (3, 6, 7)]
    chunks = list(generator.stream(missing, longest_contexts(requests)))
    for done in (one for chunk in chunks for one in chunk):
        for field in FIELDS:
            np.testing.assert_array_equal(
                getattr(done.trace, field), getattr(traced[done.row].trace, field)
            )


def test_a_stop_string_cuts_the_trace(loaded, traced):
    texts = [completion.text for completion in traced]
    stop = texts[0][len(texts[0]) // 2 :][:2]
    for done, whole in zip(recorded(loaded, stop=(stop,)), traced, strict=True):
        count = len(done.token_ids)
        assert len(done.trace.kl) == len(done.trace.log_probs) == count
        np.testing.assert_array_equal(done.trace.top_ids, whole.trace.top_ids[:count])
    assert len(recorded(loaded, stop=(stop,))[0].token_ids) < len(traced[0].token_ids)


def test_memory_is_that_of_a_chunk(loaded):
    """[slots, steps of a chunk] figures leave the device, however long the job."""
    program = engine.Program.of(loaded, trace=True)
    generator = Generator(loaded, options(trace=True, max_new_tokens=100))
    requests = make_requests(loaded.trio, generator.options, PROMPTS)
    state = generator.new_state(longest_contexts(requests))
    run = lambda *arrays: engine.chunk(program, *arrays, 4)  # noqa: E731
    _, seen = jax.eval_shape(run, loaded.params, state, generator.settings)
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(seen["trace"])} == {(4, 4)}


def test_dict_and_back(traced):
    for completion in traced:
        fields = json.loads(json.dumps(completion.trace.as_dict(), allow_nan=False))
        assert list(fields) == ["proxy", "base", "expert", "antiexpert", "kl", "overlap"]
        back, trace = Trace.from_dict(fields), completion.trace
        assert back.names == trace.names
        for field in FIELDS:
            own, read = getattr(trace, field), getattr(back, field)
            assert read.dtype == own.dtype
            np.testing.assert_allclose(read, own, atol=0.51e-4)
        token = fields["proxy"]["top_ids"][0][fields["proxy"]["ranks"][0]]
        assert token == completion.token_ids[0]


def test_rows_of_a_job(llama, tmp_path, traced, monkeypatch):
    """Interrupted and gone on; with a page and the analyses beside it."""
    whole = jobs.config_of(llama, tmp_path, trace=True, output_dir=str(tmp_path / "whole"))
    generate.main(whole)
    rows = jobs.outputs(whole)
    assert [row["trace"] for row in rows] == [one.trace.as_dict() for one in traced]
    assert [row["token_ids"] for row in rows] == tokens_of(traced)

    config = jobs.config_of(llama, tmp_path, trace=True)
    append, written = OutputFile.append, []

    def stop(self, records):
        append(self, records)
        written.extend(records)
        if written:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            generate.main(config)
    assert 0 < len(jobs.outputs(config)) < len(PROMPTS)
    generate.main(config)
    assert jobs.outputs(config) == rows

    summary = json.loads((tmp_path / "out" / "explanation.json").read_text())
    hits = [one.trace.top_ids[:, 0, 0] != one.trace.top_ids[:, 1, 0] for one in traced]
    assert summary["changed"]["value"] == pytest.approx(np.mean(hits))
    assert "<h1>What the tuning changed: out</h1>" in (tmp_path / "out" / "tokens.html").read_text()
