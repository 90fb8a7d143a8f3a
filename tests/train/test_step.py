"""Twenty training steps against a loop in torch, transformers and peft."""

from typing import Any

import jax
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

from proxy_jax.checkpoints.adapters import lora_tensors
from proxy_jax.checkpoints.names import tensors
from proxy_jax.models.decoder import hidden_states, stack_layers, unembed
from proxy_jax.models.lora import init_adapter, with_dropout
from proxy_jax.sharding import Placement, make_mesh
from tests.models import families
from train.optimizer import OptimizerConfig, decayed, make_optimizer, make_schedule
from train.step import Recipe, evaluate, model_params, new_state, train_step

ONE = Placement(make_mesh({"data": 1}))
EIGHT = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
STEPS, MICRO, ROWS, LENGTH = 20, 2, 3, 10
RANK, ALPHA = 3, 6
TARGETS = ["q_proj", "o_proj", "gate_proj", "down_proj"]
SETTINGS = OptimizerConfig(
    learning_rate=3e-3, warmup_ratio=0.2, weight_decay=0.1, max_grad_norm=0.5, schedule="linear"
)


def batches():
    """[A, B, T] batches whose micro-batches have very different numbers of trained tokens."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(3, 100, (MICRO, ROWS, LENGTH + 1)).astype(np.int32)
        weights = (rng.random((MICRO, ROWS, LENGTH)) < [[[0.9]], [[0.3]]]).astype(np.float32)
        shape = (MICRO, ROWS, LENGTH)
        yield {
            "tokens": tokens[..., :-1],
            "targets": tokens[..., 1:],
            "weights": weights,
            "segments": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        }


def torch_losses(model):
    """The plain loop: gradients of the mean over all trained tokens of a step."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trained if "norm" not in n and "bias" not in n]},
        {"params": [p for n, p in trained if "norm" in n or "bias" in n], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay, eps=SETTINGS.eps
    )
    schedule = transformers.get_linear_schedule_with_warmup(adamw, 4, STEPS)
    losses = []
    for batch in batches():
        count = batch["weights"].sum()
        total = torch.tensor(0.0)
        for a in range(MICRO):
            logits = model(torch.tensor(batch["tokens"][a]).long()).logits
            log_p = logits.log_softmax(-1)
            chosen = log_p.gather(-1, torch.tensor(batch["targets"][a]).long()[..., None])[..., 0]
            total = total - (chosen * torch.tensor(batch["weights"][a])).sum() / float(count)
        total.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], SETTINGS.max_grad_norm)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        losses.append(float(total))
    return losses


def recipe_of(reference, place=ONE, lora=False, **fields):
    settings = {
        "optimizer": make_optimizer(SETTINGS, STEPS),
        "compute_dtype": "float32",
        "remat": "none",
        "lora_scale": ALPHA / RANK if lora else None,
    }
    return Recipe(model=reference.config, place=place, **(settings | fields))


def our_losses(recipe, trained, frozen):
    state = new_state(recipe, jax.tree.map(lambda x: x.copy(), trained), jax.random.key(0))
    losses = []
    for batch in batches():
        state, metrics = train_step(recipe, state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses, state.trained


@pytest.fixture(scope="module")
def full(build):
    """The torch loop over all parameters, once for all variants of ours."""
    reference = build("llama_yarn_biases")
    model = families.torch_model(reference.name).train()
    return reference, torch_losses(model), model.state_dict()


@pytest.mark.parametrize(
    ("place", "stacked", "remat"),
    [(ONE, False, "none"), (ONE, True, "full"), (ONE, False, "dots"), (EIGHT, True, "none")],
)
def test_full_fine_tuning(full, place, stacked, remat):
    reference, losses, theirs = full
    params = reference.load(place, stacked=stacked)
    ours, trained = our_losses(recipe_of(reference, place, remat=remat), params, None)
    np.testing.assert_allclose(ours, losses, atol=1e-4)
    trained = jax.device_get(trained)
    for tensor in tensors(reference.config):
        path = list(tensor.path)
        layer = path.pop(1) if stacked and path[0] == "layers" else None
        leaf = trained
        for key in path:
            leaf = leaf[key]
        found = tensor.to_file(leaf if layer is None else leaf[layer])
        np.testing.assert_allclose(found, theirs[tensor.name].numpy(), atol=1e-4, err_msg=str(path))


@pytest.mark.parametrize("stacked", [False, True])
def test_lora(build, stacked):
    reference = build("llama")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    model = peft.get_peft_model(families.torch_model(reference.name), config)
    frozen = reference.load(ONE, stacked=stacked)
    adapter = jax.device_get(init_adapter(reference.params, TARGETS, RANK, jax.random.key(3)))
    state = model.state_dict()
    found = lora_tensors(reference.config, RANK)
    found = [t for t in found if any(target in t.name for target in TARGETS)]
    for tensor in found:
        _, layer, part, name, matrix = tensor.path
        value = tensor.to_file(adapter["layers"][layer][part][name][matrix])
        stored = tensor.name.replace(".weight", ".default.weight")
        assert state[stored].shape == value.shape
        state[stored].copy_(torch.tensor(value))
    losses = torch_losses(model)
    ours, trained = our_losses(
        recipe_of(reference, lora=True),
        jax.device_put(stack_layers(adapter) if stacked else adapter),
        frozen,
    )
    np.testing.assert_allclose(ours, losses, atol=1e-4)
    for tensor in found:
        _, layer, part, name, matrix = tensor.path
        layers = trained["layers"]
        leaf = (layers if stacked else layers[layer])[part][name][matrix]
        value = tensor.to_file(np.asarray(leaf[layer] if stacked else leaf))
        theirs = model.state_dict()[tensor.name.replace(".weight", ".default.weight")]
        np.testing.assert_allclose(value, theirs.numpy(), atol=1e-4)


def test_packed_examples_do_not_see_each_other(build):
    """Packed into one row with segments, two examples lose what they lose apart."""
    reference = build("gemma3")
    model = families.torch_model(reference.name)
    recipe = recipe_of(reference)
    rng = np.random.default_rng(1)
    lengths = (4, 9)
    apart = []
    parts: list[dict[str, Any]] = []
    for length in lengths:
        tokens = rng.integers(3, 100, length + 1).astype(np.int32)
        part = {
            "tokens": tokens[None, :-1],
            "targets": tokens[None, 1:],
            "weights": np.ones((1, length), np.float32),
            "segments": np.full((1, length), len(parts) + 1, np.int32),
            "positions": np.arange(length, dtype=np.int32)[None],
        }
        parts.append(part)
        with torch.no_grad():
            logits = model(torch.tensor(part["tokens"]).long()).logits
        apart.append(
            float(
                torch.nn.functional.cross_entropy(
                    logits[0], torch.tensor(part["targets"][0]).long(), reduction="sum"
                )
            )
        )
    packed = {key: np.concatenate([part[key] for part in parts], axis=1) for key in parts[0]}
    packed = {key: np.pad(value, [(0, 0), (0, 3)]) for key, value in packed.items()}
    total, count = evaluate(recipe, reference.params, None, packed)
    np.testing.assert_allclose(float(total), sum(apart), rtol=1e-5)
    assert int(count) == sum(lengths)


def test_loss_of_long_rows_in_pieces(build, monkeypatch):
    """Rows longer than a piece, and not a multiple of it."""
    reference = build("llama")
    batch = {key: value[0] for key, value in next(batches()).items()}
    whole = evaluate(recipe_of(reference), reference.params, None, batch)
    x, _ = hidden_states(reference.config, reference.params, batch["tokens"], batch["positions"])
    log_p = jax.nn.log_softmax(unembed(reference.config, reference.params, x))
    chosen = np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(float(whole[0]), -(chosen * batch["weights"]).sum(), rtol=1e-5)
    monkeypatch.setattr("train.step.LOSS_TOKENS", 4)
    pieces = evaluate(recipe_of(reference), reference.params, None, batch)
    np.testing.assert_allclose(float(pieces[0]), float(whole[0]), rtol=1e-5)


def test_dropout(build):
    """Scaled by what is kept, another at each layer and step; none in evaluation."""
    reference = build("llama")
    adapter = init_adapter(reference.params, TARGETS, RANK, jax.random.key(3))
    recipe = recipe_of(reference, lora=True, lora_dropout=0.5)
    one, two = (
        model_params(recipe, adapter, reference.params, jax.random.key(seed)) for seed in (1, 2)
    )
    keys = [
        jax.random.key_data(params["layers"][layer]["mlp"]["gate"].key).tolist()
        for params in (one, two)
        for layer in (0, 1)
    ]
    assert len({tuple(key) for key in keys}) == 4
    plain = model_params(recipe, adapter, reference.params, None)
    assert plain["layers"][0]["mlp"]["gate"].key is None
    dropped = with_dropout(plain, 0.5, jax.random.key(5))["layers"][0]["mlp"]["gate"]
    assert dropped.dropout == 0.5


def test_schedules_equal_transformers():
    builders: dict[str, Any] = {
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "constant": transformers.get_constant_schedule_with_warmup,
    }
    for name, build in builders.items():
        config = OptimizerConfig(learning_rate=0.5, schedule=name, warmup_ratio=0.13)
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.5)
        extra = () if name == "constant" else (50,)
        theirs = build(optimizer, 7, *extra)
        ours = make_schedule(config, 50)
        for step in range(50):
            assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-7), (name, step)
            optimizer.step()
            theirs.step()


def test_decay_skips_norms_and_biases(build):
    params = build("llama_yarn_biases").params
    flags = jax.tree_util.tree_leaves_with_path(decayed(params))
    by_name = {jax.tree_util.keystr(path): flag for path, flag in flags}
    assert {flag for name, flag in by_name.items() if "norm" in name or "bias" in name} == {False}
    assert {flag for name, flag in by_name.items() if not ("norm" in name or "bias" in name)} == {
        True
    }
    assert isinstance(optax.adamw(1e-3, mask=decayed), optax.GradientTransformation)
