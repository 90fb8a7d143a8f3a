"""The benchmark measures what it says, and counts what torch's models hold."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.defaults import decoding
from decode import benchmark, engine, memory, timing
from decode.torch_loop import TorchTrio
from proxy_jax.errors import InputError
from tests.decode.jobs import config_of
from tests.trios import EOS, PROMPTS, ROLES, STEPS


@pytest.fixture(autouse=True)
def little_to_read(monkeypatch):
    """The bandwidth is asked for anew at each row."""
    monkeypatch.setattr(timing, "_PROBED", 2**20)


CASES = [(1, 5, 4), (2, 5, 4)]


def config_for(llama, directory, **fields):
    small = {"batch_sizes": (1, 2), "prompt_lengths": (5,), "output_lengths": (4,), "repeats": 2}
    named = {f"benchmark__{name}": value for name, value in (small | fields).items()}
    return config_of(llama, directory, chunk_steps=3, **named)


def step_bytes(model, batch, values=4):
    """Of float32, or with weights that are values bytes a number; its layers and head are whole."""
    weights = 0
    for name, weight in model.named_parameters():
        matrix = weight.ndim == 2 and "embed_tokens" not in name
        if matrix and values == 1:
            weights += weight.numel() + 4 * weight.shape[0]  # and a scale an output
        elif "embed_tokens" not in name:
            weights += 4 * weight.numel()
    config = model.config
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    return weights + batch * (5 + 4 / 2) * slot


def test_table(llama, tmp_path, capsys, monkeypatch):
    steps = []
    real = engine.chunk

    def chunk(program, params, state, settings, count):
        state, seen = real(program, params, state, settings, count)
        steps.append((len(program.roles), (np.asarray(seen["tokens"]) >= 0).sum(axis=1).tolist()))
        return state, seen

    monkeypatch.setattr(engine, "chunk", chunk)
    config = config_for(
        llama,
        tmp_path,
        plans=("separate", "stacked"),
        dtypes=("float32", "int8"),
        compare="torch",
    )
    benchmark.main(config)
    content = json.loads((Path(config.output_dir) / "benchmark.json").read_text())
    rows, bandwidth = content["rows"], content["bandwidth"]
    kinds = [("proxy_jax", dtype, plan) for dtype in ("float32", "int8")
             for plan in ("alone", "separate", "stacked")]  # fmt: skip
    kinds += [("torch", "float32", "alone"), ("torch", "float32", "trio")]
    assert [(row["by"], row["dtype"], row["plan"]) for row in rows[:: len(CASES)]] == kinds
    assert [(row["batch"], row["prompt"], row["output"]) for row in rows] == CASES * len(kinds)

    # A warm-up and two repeats of each, in chunks of 3 and 1 steps, no row ending early.
    ours = [row for row in rows if row["by"] == "proxy_jax"]
    expected = [
        (1 if row["plan"] == "alone" else 3, [count] * row["batch"])
        for row in ours
        for count in (3, 1) * 3
    ]
    assert steps == expected
    for row in rows:
        assert len(row["prefill_seconds"]) == len(row["decode_seconds"]) == 2
        ms = 1000 * statistics.median(row["decode_seconds"]) / row["steps"]
        assert row["ms_a_step"] == pytest.approx(ms)
        assert row["steps"] == (4 if row["by"] == "proxy_jax" else 3)
        totals = [a + b for a, b in zip(row["prefill_seconds"], row["decode_seconds"], strict=True)]
        tokens = row["batch"] * 4 / statistics.median(totals)
        assert row["tokens_per_second"] == pytest.approx(tokens)
    for row in ours:
        values = 1 if row["dtype"] == "int8" else 4
        sizes = {
            role: step_bytes(model, row["batch"], values) for role, model in llama.models.items()
        }
        size = sizes["base"] if row["plan"] == "alone" else sum(sizes.values())
        assert row["step_bytes"] == size
        floor = 1000 * size / bandwidth
        assert row["share_of_floor"] == pytest.approx(floor / row["ms_a_step"])
        if row["plan"] != "alone":
            assert row["floor_overhead"] == pytest.approx(size / sizes["base"])
            (alone,) = [
                other["ms_a_step"]
                for other in ours
                if (other["plan"], other["dtype"], other["batch"])
                == ("alone", row["dtype"], row["batch"])
            ]
            assert row["overhead"] == pytest.approx(row["ms_a_step"] / alone)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if " against torch float32: " in line]) >= 4
    assert (Path(config.output_dir) / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_architectures_alone(tmp_path, capsys):
    """No file is there: weights of the shapes are drawn, and so is an adapter of the rank."""
    config = decoding()
    for role in ROLES:
        config[role].path = "tiny"
    config.expert.adapter, config.plan = "rank=4", "shared"
    config.output_dir = str(tmp_path)
    small = {"batch_sizes": (2,), "prompt_lengths": (5,), "output_lengths": (4,), "repeats": 1}
    config.benchmark.update(small, dtypes=("bfloat16", "int8"), compare="torch")
    benchmark.main(config)
    assert "random weights" in capsys.readouterr().out
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [(row["by"], row["dtype"], row["plan"]) for row in rows] == [
        ("proxy_jax", "bfloat16", "alone"),
        ("proxy_jax", "bfloat16", "shared"),
        ("proxy_jax", "int8", "alone"),
        ("proxy_jax", "int8", "shared"),
        ("torch", "bfloat16", "alone"),
        ("torch", "bfloat16", "trio"),
    ]
    # By hand, for one layer of two: q and o, k and v, gate, up and down; then the head.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    adapter = 4 * (2 * 128 + 2 * 96 + 3 * 192)
    norms = 5 * 64
    model = 2 * layer + 512 * 64 + norms
    slots = 2 * (5 + 4 / 2) * (2 * 2 * 2 * 16)  # of two rows: keys and values, layers, heads
    assert rows[0]["step_bytes"] == 2 * (model + slots)
    assert rows[1]["step_bytes"] == 2 * (2 * model + 2 * adapter + 3 * slots)


def test_architectures_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_available", lambda place: 2**30)
    config = decoding()
    config.base.path, config.output_dir = "meta-llama/Llama-2-7b-hf", str(tmp_path)
    config.benchmark.update(batch_sizes=(1,), prompt_lengths=(5,), output_lengths=(4,))
    with pytest.raises(InputError, match=r"needs about 1[23]\.\d GiB a device"):
        benchmark.main(config)


def test_the_torch_loop_is_proxy_tuning(llama):
    """It draws what the loop of the tests draws, which reads each context anew."""
    loop = TorchTrio([model.config.to_dict() for model in llama.models.values()], "float32", 0.7)
    shapes = [[p.shape for p in model.parameters()] for model in loop.models]
    assert shapes == [[p.shape for p in model.parameters()] for model in llama.models.values()]
    loop.models = list(llama.models.values())
    ids = llama.ids(PROMPTS[1])["base"]
    no_eos = lambda context, scores: np.where(np.arange(len(scores)) == EOS, -np.inf, scores)  # noqa: E731
    banned = [EOS, *range(len(llama.tokenizers["base"]), 320)]
    answers = llama.greedy(
        dict.fromkeys(llama.models, ids), STEPS, llama.shifted(0.7), no_eos, eos=()
    )
    drawn, first, rest = loop.decode(np.asarray([ids, ids]), STEPS, banned)
    assert drawn.tolist() == [answers, answers]
    assert first > 0 < rest
    alone = llama.greedy({"base": ids}, STEPS, lambda s, _: s["base"], no_eos, eos=())
    assert loop.decode(np.asarray([ids]), STEPS, banned, alone=True)[0].tolist() == [alone]


def test_vocabularies_with_other_padding(llama):
    fields = [model.config.to_dict() for model in llama.models.values()]
    for config, more in zip(fields, (0, 8, 3), strict=True):
        config["vocab_size"] += more
    drawn, *_ = TorchTrio(fields, "float32").decode(np.ones((2, 3), int), 4, [EOS])
    assert drawn.shape == (2, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtypes": ("int4",)}, "benchmark.dtypes: 'int4' is unknown"),
        ({"compare": "tf"}, "benchmark.compare 'tf' is unknown"),
        ({"batch_sizes": ()}, "benchmark.batch_sizes must be 1 or more"),
        ({"output_lengths": (4, 1)}, "benchmark.output_lengths must be 2 or more"),
        ({"prompt_lengths": (9999,)}, "10003 tokens exceed base's context of"),
        ({"plans": ("shared",)}, "plan 'shared' needs"),
        ({"repeats": 0}, "benchmark.repeats must be at least 1"),
    ],
)
def test_what_is_refused(llama, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        benchmark.main(config_for(llama, tmp_path, **fields))


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"benchmark.compare is 'torch': .* pip install torch"):
        TorchTrio([], "float32")
