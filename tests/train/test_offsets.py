"""Consistent proxy tuning: the offsets on disk, and training through the combined logits."""

import dataclasses
import fcntl
import shutil

import jax
import numpy as np
import optax
import pytest
import torch

from proxy_jax.checkpoints.loading import load_params
from proxy_jax.checkpoints.names import tensors
from proxy_jax.errors import InputError
from proxy_jax.sharding import TRAINING, Placement, make_mesh
from proxy_jax.trio import open_trio
from tests import trios
from train import offsets as module
from train.data import Batches, Batching
from train.examples import Example
from train.offsets import with_offsets
from train.step import Recipe, evaluate, new_state, train_step

ONE = Placement(make_mesh({"data": 1}), TRAINING)
EIGHT = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), TRAINING)
ROLES = ("base", "antiexpert")
ALPHA, STEPS, MICRO, ROWS, LENGTH, RATE = 0.7, 6, 2, 4, 32, 0.5


@pytest.fixture(scope="module", autouse=True)
def quick_compiles_of_all():
    """Most of the time of these tests is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """M is wider than M-; either has rows that the other lacks, and some tokens stand elsewhere."""
    models = {
        "base": trios.make_model("llama", 320, 0, hidden_size=48),
        "antiexpert": trios.make_model("qwen2", 328, 1, num_hidden_layers=1),
    }
    tokenizers = {"antiexpert": trios.make_tokenizer(swap=8)}
    return trios.write_trio(tmp_path_factory.mktemp("pair"), models, tokenizers)


def specs(trio, dtype="float32"):
    return {role: dataclasses.replace(trio.spec(role), dtype=dtype) for role in ROLES}


def make_examples(ids, lengths, seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for line, n in enumerate(lengths, 1):
        trained = rng.random(n + 1) < 0.7
        trained[0], trained[-1] = False, True
        examples.append(Example(rng.choice(ids, n + 1).astype(np.int32), trained, line))
    return examples


@pytest.fixture(scope="module")
def examples(pair):
    """Padded to 32 and 64, in several batches; one batch has more trained tokens than a chunk."""
    lengths = [32, 5, 64, 31, 52, 30, 1, 32, 28, 60, 32, 17, 26, 31, 3]
    return make_examples(np.flatnonzero(pair.shared), lengths)


def logits(model, example):
    """What a torch model says of each target of an example, [T, V]."""
    return model(torch.tensor(example.tokens[None, :-1]).long()).logits[0]


def log_p(trio, role, example):
    """Of the trained tokens over the shared ids, [n, shared ids]."""
    with torch.inference_mode():
        scores = logits(trio.models[role], example)[example.trained[1:]]
        return scores[:, np.flatnonzero(trio.shared)].log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def cache(pair, examples, tmp_path_factory):
    """A directory of offsets, made at one go."""
    directory = tmp_path_factory.mktemp("offsets")
    with_offsets(examples, open_trio(specs(pair)), directory, ONE)
    return directory


@pytest.mark.parametrize(("place", "stacked"), [(ONE, False), (EIGHT, True)])
def test_offsets_equal_torch(pair, examples, tmp_path, place, stacked):
    steps = []
    found = with_offsets(
        examples, open_trio(specs(pair)), tmp_path, place, stacked_layers=stacked,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    shared = np.flatnonzero(pair.shared)
    assert len(shared) == trios.TOKENS - 8
    total = 0
    for example, given in zip(found, examples, strict=True):
        assert example.line == given.line
        offsets = np.asarray(example.offsets)
        assert offsets.dtype == np.float16
        assert offsets.shape == (given.trained[1:].sum(), 328)
        wanted = log_p(pair, "base", given) - log_p(pair, "antiexpert", given)
        np.testing.assert_allclose(offsets[:, shared], wanted, rtol=1e-3, atol=1e-4)
        assert not np.delete(offsets, shared, axis=1).any()
        # M- with them gives the other ids what it gives them without.
        with torch.inference_mode():
            plain = logits(pair.models["antiexpert"], given)[given.trained[1:]]
        combined, alone = (
            np.delete(scores.softmax(-1).numpy(), shared, axis=1)
            for scores in (plain + torch.tensor(offsets).float(), plain)
        )
        np.testing.assert_allclose(combined, alone, rtol=5e-3, atol=1e-6)
        total += len(wanted)
    assert {of for _, of in steps} == {total}
    done = [done for done, _ in steps]
    assert done[0] == 0
    assert done[-1] == total
    assert done == sorted(set(done))
    if place is ONE:
        assert len(done) > 3
        assert max(np.diff(done)) > 128  # more than a chunk


def test_an_interrupted_cache_equals_an_uninterrupted_one(
    pair, examples, cache, tmp_path, monkeypatch
):
    trio = open_trio(specs(pair))
    starts = []

    def interrupt(done, total):
        starts.append(done)
        if done and done > starts[0]:
            raise KeyboardInterrupt

    while not starts or starts[-1] < 200:
        starts.clear()
        with pytest.raises(KeyboardInterrupt):
            with_offsets(examples, trio, tmp_path, ONE, progress=interrupt)
        with (tmp_path / "offsets.bin").open("ab") as file:
            file.write(b"half a batch" * 1000)  # as a kill leaves it
    resumed = with_offsets(examples, trio, tmp_path, ONE)
    for name in ("offsets.bin", "manifest.json"):
        assert (tmp_path / name).read_bytes() == (cache / name).read_bytes()

    monkeypatch.setattr(module, "load_trio", None)  # a whole cache needs no model
    again = with_offsets(examples, open_trio(specs(pair)), tmp_path, ONE)
    for one, other in zip(again, resumed, strict=True):
        np.testing.assert_array_equal(one.offsets, other.offsets)


def test_another_cache_in_the_directory(pair, examples, cache, tmp_path):
    def fails(message, examples, trio, directory=cache):
        with pytest.raises(InputError, match=message):
            with_offsets(examples, open_trio(trio), directory, ONE)

    here = f"^{cache}: holds offsets of another run "
    one = examples[0]
    other = dataclasses.replace(one, tokens=np.roll(one.tokens, 1))
    fails(here + r"\(examples: '", [other, *examples[1:]], specs(pair))
    trained = one.trained.copy()
    trained[1:] = np.roll(trained[1:], 1)
    other = dataclasses.replace(one, trained=trained)
    fails(here + r"\(examples: '", [other, *examples[1:]], specs(pair))
    fails(here + r"\(base: {", examples, specs(pair, "bfloat16"))
    moved = specs(pair) | {"antiexpert": specs(pair)["base"]}
    fails(here + r"\(antiexpert: {", examples, moved)

    copy = tmp_path / "offsets"
    shutil.copytree(cache, copy)
    (copy / "offsets.bin").write_bytes(b"")
    fails(
        "offsets.bin: [0-9]+ rows are said to be done, and 0 are there", examples, specs(pair), copy
    )
    (copy / "manifest.json").write_text("[]")
    fails("manifest.json: not a JSON object", examples, specs(pair), copy)
    for done in ('"3"', "-1", "null", "1e999"):
        (copy / "manifest.json").write_text(f'{{"done": {done}}}')
        fails("manifest.json: done (must be|is missing)", examples, specs(pair), copy)
    (copy / "manifest.json").unlink()
    (copy / "offsets.bin").write_bytes(bytes(2000))
    fails("offsets.bin: exists, but no manifest.json", examples, specs(pair), copy)
    with (copy / "offsets.bin").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fails("offsets.bin: another process is writing it", examples, specs(pair), copy)


def test_a_full_disk(pair, examples, tmp_path, monkeypatch):
    total = sum(int(example.trained[1:].sum()) for example in examples)
    size = total * 328 * 2
    usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(module, "_GIB", 2**10)
    needs = rf"^{tmp_path}: the offsets of {total} trained tokens take another {size / 2**10:.1f} "
    with pytest.raises(InputError, match=needs):
        with_offsets(examples, open_trio(specs(pair)), tmp_path, ONE)
    done: list[int] = []

    def interrupt(now, total):
        done.append(now)
        if now:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    with pytest.raises(KeyboardInterrupt):
        with_offsets(examples, open_trio(specs(pair)), tmp_path, ONE, progress=interrupt)
    # Only what is missing is asked for.
    left = (total - done[-1]) * 328 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left))
    assert with_offsets(examples, open_trio(specs(pair)), tmp_path, ONE)[0].offsets is not None


def test_what_is_refused(pair, examples, tmp_path, monkeypatch):
    trio = open_trio(specs(pair))

    def fails(message, tokens):
        bad = Example(np.asarray(tokens, np.int32), np.ones(len(tokens), bool), 77)
        with pytest.raises(InputError, match=message):
            with_offsets([*examples, bad], trio, tmp_path, ONE)

    (moved, *_) = trio.vocabulary.moved["antiexpert"]
    word = pair.tokenizers["antiexpert"].convert_ids_to_tokens(moved)
    fails(rf"^line 77: id {moved} \('{word}'\) is another token in the base's", [5, moved, 6])
    fails(r"^line 77: id 325 \(None\) is another token .* or none$", [5, 6, 325])
    fails("^line 77: 513 tokens exceed base's context of 512", [5] * 514)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    fails("^consistent tuning runs in one process for now", [5, 6])


def test_nan_names_the_line_and_the_model(pair, examples, tmp_path, monkeypatch):
    whole = module.load_trio

    def broken(*arguments, **settings):
        loaded = whole(*arguments, **settings)
        base, anti = loaded.params
        embedding = anti["embedding"].at[int(examples[4].tokens[51])].set(np.nan)
        return dataclasses.replace(loaded, params=(base, anti | {"embedding": embedding}))

    only = [dataclasses.replace(e, tokens=np.minimum(e.tokens, 50)) for e in examples]
    tokens = only[4].tokens.copy()
    tokens[51] = examples[4].tokens[51] = 60
    only[4] = dataclasses.replace(only[4], tokens=tokens)
    monkeypatch.setattr(module, "load_trio", broken)
    with pytest.raises(InputError, match=r"^line 5: logits of antiexpert are not finite$"):
        with_offsets(only, open_trio(specs(pair)), tmp_path, ONE)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """M and M- of one vocabulary, examples for a few steps, and what a torch loop makes of them."""
    small = {"initializer_range": 0.15, "num_hidden_layers": 1}
    trio = trios.write_trio(
        tmp_path_factory.mktemp("tuned"),
        {
            "base": trios.make_model("llama", trios.TOKENS, 3, hidden_size=48, **small),
            "antiexpert": trios.make_model("llama", trios.TOKENS, 4, **small),
        },
    )
    rng = np.random.default_rng(1)
    lengths = rng.integers(4, 20, 60)
    given = make_examples(np.arange(3, trios.TOKENS), lengths, seed=2)
    found = with_offsets(given, open_trio(specs(trio)), tmp_path_factory.mktemp("cache"), ONE)
    batches = list(Batches(found, Batching(MICRO * ROWS, LENGTH, epochs=4)))[:STEPS]
    assert len(batches) == STEPS
    assert all((batch["segments"] == 2).any() for batch in batches)

    by_line = {example.line: example for example in given}
    theta = trios.make_model("llama", trios.TOKENS, 4, **small).train()
    optimizer = torch.optim.SGD(theta.parameters(), lr=RATE)
    losses = []
    for batch in batches:
        lines = [
            line
            for row, segments in zip(batch["lines"], batch["segments"], strict=True)
            for line in (row[segments == s][0] for s in range(1, segments.max() + 1))
        ]
        total = sum(combined_loss(trio, theta, by_line[int(line)]) for line in lines)
        loss = total / sum(by_line[int(line)].trained[1:].sum() for line in lines)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return trio, batches, losses, theta


def combined_loss(trio, theta, example):
    """L = CE(softmax(s_theta + alpha (s_M - s_-)), y), summed over the trained tokens."""
    with torch.no_grad():
        base, anti = (logits(trio.models[role], example) for role in ROLES)
    combined = logits(theta, example) + ALPHA * (base - anti)
    targets = torch.tensor(example.tokens[1:]).long()
    each = torch.nn.functional.cross_entropy(combined, targets, reduction="none")
    return each[torch.tensor(example.trained[1:])].sum()


@pytest.mark.parametrize(("place", "stacked"), [(ONE, False), (EIGHT, True)])
def test_training_equals_torch(tuned, monkeypatch, place, stacked):
    trio, batches, losses, theta = tuned
    monkeypatch.setattr("train.step.LOSS_TOKENS", 7)  # several pieces, the last one not full
    member = open_trio(specs(trio)).members["antiexpert"]
    params = load_params([member.checkpoint], member.config, "float32", place, stacked=stacked)
    recipe = Recipe(member.config, optax.sgd(RATE), "float32", "none", place, alpha_train=ALPHA)
    if place is ONE:
        first = {name: value for name, value in batches[0].items() if name != "lines"}
        total, count = evaluate(recipe, params, None, first)
        assert float(total / count) == pytest.approx(losses[0], abs=1e-4)
    state = new_state(recipe, params, jax.random.key(0))
    ours: list[float] = []
    for batch in batches:
        cut = {
            name: value.reshape(MICRO, ROWS, *value.shape[1:])
            for name, value in batch.items()
            if name != "lines"
        }
        if not ours:
            counts = cut["weights"].sum(axis=(1, 2))
            assert counts[0] != counts[1]
        state, metrics = train_step(recipe, state, None, cut)
        ours.append(float(metrics["loss"]))
    np.testing.assert_allclose(ours, losses, atol=1e-4)
    assert abs(losses[-1] - losses[0]) > 0.05
    trained = jax.device_get(state.trained)
    theirs = theta.state_dict()
    for tensor in tensors(member.config):
        path = list(tensor.path)
        layer = path.pop(1) if stacked and path[0] == "layers" else None
        leaf = trained
        for key in path:
            leaf = leaf[key]
        found = tensor.to_file(leaf if layer is None else leaf[layer])
        np.testing.assert_allclose(found, theirs[tensor.name], atol=1e-4, err_msg=tensor.name)
