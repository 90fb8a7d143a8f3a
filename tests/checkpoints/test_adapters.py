"""LoRA adapters that peft wrote and adapters that we wrote, against peft's own logits."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from proxy_jax.checkpoints.adapters import save_adapter, with_adapter
from proxy_jax.errors import InputError
from proxy_jax.models.decoder import apply
from proxy_jax.models.lora import Adapted, is_adapted, merge
from proxy_jax.sharding import Placement, make_mesh
from tests.models import families

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ONE = Placement(make_mesh({"data": 1}))
TOKENS = np.arange(24).reshape(2, 12) % 90
POSITIONS = np.broadcast_to(np.arange(12), (2, 12))


def adapted(reference, directory, targets):
    """A peft model with random A and B, saved; returns it in torch."""
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets)
    torch.manual_seed(0)
    model = peft.get_peft_model(families.torch_model(reference.name), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    return model


def logits(reference, params, place):
    with jax.default_matmul_precision("highest"):
        run = jax.jit(apply, static_argnums=(0, 5))
        return np.asarray(run(reference.config, params, TOKENS, POSITIONS, None, place)[0])


@pytest.mark.parametrize(("name", "targets"), [("llama", ALL), ("gemma3", ["q_proj", "o_proj"])])
@pytest.mark.parametrize("stacked", [False, True])
def test_logits_equal_pefts(build, tmp_path, name, targets, stacked):
    reference = build(name)
    model = adapted(reference, tmp_path, targets)
    with torch.inference_mode():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    plain = reference.load(ONE, stacked=stacked)
    ours = logits(reference, with_adapter(plain, tmp_path, reference.config, "float32", ONE), ONE)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - logits(reference, plain, ONE)).max() > 0.1


def test_eight_devices_equal_one(build, tmp_path):
    reference = build("llama")
    adapted(reference, tmp_path, ALL)
    eight = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    one, many = (
        logits(
            reference,
            with_adapter(
                reference.load(p, stacked=False), tmp_path, reference.config, "float32", p
            ),
            p,
        )
        for p in (ONE, eight)
    )
    np.testing.assert_allclose(many, one, atol=1e-4)


def edit_config(directory, **fields):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(directory, change):
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit_config(d, use_dora=True), "use_dora=True is not supported"),
        (lambda d: edit_config(d, peft_type="IA3"), "peft_type='IA3' is not supported"),
        (lambda d: edit_config(d, r=0), "r must be a positive number"),
        (lambda d: edit_config(d, r=4), "q_proj.lora_A.weight has shape"),
        (lambda d: edit_tensors(d, lambda t: t.pop(FIRST)), "in every layer"),
        (lambda d: edit_tensors(d, lambda t: t.update(x=t[FIRST])), "tensor x adapts nothing"),
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: not a"),
    ],
)
def test_what_is_refused(build, tmp_path, damage, message):
    reference = build("llama")
    adapted(reference, tmp_path, ["q_proj"])
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        with_adapter(reference.params, tmp_path, reference.config, "float32", ONE)


def random_adapter(config, modules, *, stacked):
    """A tree of random A and B, R = 3, on (part of a block, weight, axes that are inputs)."""
    rng = np.random.default_rng(0)
    sizes = config.sizes
    letters = {"q": "D NH", "v": "D KH", "o": "NH D", "down": "F D"}
    layers = [
        {
            part: {
                name: {
                    "a": rng.normal(0.0, 0.3, [*(sizes[x] for x in into), 3]).astype("float32"),
                    "b": rng.normal(0.0, 0.3, [3, *(sizes[x] for x in out)]).astype("float32"),
                }
                for name in names
                for into, out in [letters[name].split()]
            }
            for part, names in modules.items()
        }
        for _ in range(config.num_layers)
    ]
    tree = jax.tree.map(lambda *x: np.stack(x), *layers) if stacked else tuple(layers)
    return {"layers": jax.tree.map(jnp.asarray, tree)}


def matrices(params):
    found = jax.tree.leaves(params, is_leaf=is_adapted)
    return [matrix for leaf in found if is_adapted(leaf) for matrix in (leaf.a, leaf.b)]


SOME = {"attention": ["o", "q", "v"], "mlp": ["down"]}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("stacked", [False, True])
def test_what_we_save(build, tmp_path, name, stacked):
    """peft computes what we compute, and we read what we wrote."""
    reference = build(name)
    adapter = random_adapter(reference.config, SOME, stacked=stacked)
    save_adapter(tmp_path, reference.config, adapter, 3, 7, str(reference.path), 0.1)
    model = peft.PeftModel.from_pretrained(families.torch_model(name), str(tmp_path))
    settings: Any = model.peft_config["default"]
    assert settings.target_modules == {"q_proj", "v_proj", "o_proj", "down_proj"}
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (3, 7, 0.1)
    assert settings.base_model_name_or_path == str(reference.path)
    with torch.inference_mode():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()

    plain = reference.load(ONE, stacked=stacked)
    params = with_adapter(plain, tmp_path, reference.config, "float32", ONE)
    found, expected = matrices(params), jax.tree.leaves(adapter)
    assert len(found) == len(expected) == 2 * 4 * (1 if stacked else reference.config.num_layers)
    for ours, saved in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, saved)
    np.testing.assert_allclose(logits(reference, params, ONE), theirs, atol=1e-4)
    np.testing.assert_allclose(logits(reference, merge(params), ONE), theirs, atol=1e-4)
    assert np.abs(theirs - logits(reference, plain, ONE)).max() > 0.1


@pytest.mark.parametrize("stacked", [False, True])
def test_merged_weights_equal_pefts(build, tmp_path, stacked):
    reference = build("llama")
    model = adapted(reference, tmp_path, ALL).merge_and_unload()
    plain = reference.load(ONE, stacked=stacked)
    merged = merge(with_adapter(plain, tmp_path, reference.config, "float32", ONE))
    assert not any(map(is_adapted, jax.tree.leaves(merged, is_leaf=is_adapted)))
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in [
            (("attention", "q"), layer.self_attn.q_proj),
            (("attention", "o"), layer.self_attn.o_proj),
            (("mlp", "up"), layer.mlp.up_proj),
        ]:
            part, name = ours
            array = merged["layers"][part][name][i] if stacked else merged["layers"][i][part][name]
            expected = theirs.weight.detach().numpy()
            matrix = np.moveaxis(array, -1, 0) if name == "o" else np.moveaxis(array, 0, -1)
            np.testing.assert_allclose(matrix.reshape(expected.shape), expected, atol=1e-6)


def test_merging_rounds_once():
    """In bfloat16, W + 0.3 A B is the float32 sum rounded, and not a sum of rounded terms."""
    rng = np.random.default_rng(1)
    weight, a, b = (
        rng.normal(size=shape).astype("bfloat16") for shape in [(40, 6, 5), (40, 4), (4, 6, 5)]
    )
    merged = merge({"w": Adapted(jnp.asarray(weight), jnp.asarray(a), jnp.asarray(b), 0.3)})["w"]
    assert merged.dtype == jnp.bfloat16
    wide = [x.astype("float64") for x in (weight, a, b)]
    exact = wide[0] + 0.3 * np.einsum("iR,Rjk->ijk", wide[1], wide[2])
    nearest = exact.astype("float32").astype("bfloat16")
    assert np.mean(np.asarray(merged) == nearest) > 0.998  # the rest lie between two numbers


def test_what_is_not_saved(build, tmp_path):
    config = build("llama").config

    def refused(adapter, message, rank=3):
        with pytest.raises(InputError, match=message):
            save_adapter(tmp_path / "new", config, adapter, rank, 7, "base")
        assert not (tmp_path / "new").exists()

    good = random_adapter(config, {"attention": ["q"]}, stacked=False)
    refused(good, r"q_proj\.lora_A\.weight has shape \(48, 3\), .* rank 4", rank=4)
    pair = {"a": jnp.zeros((106, 3)), "b": jnp.zeros((3, 48))}
    refused({**good, "embedding": pair}, "6 of the adapter's 8 matrices")
    refused({"layers": ({},) * config.num_layers}, "0 of the adapter's 0 matrices")
    save_adapter(tmp_path, config, good, 3, 7, "base")
    with pytest.raises(InputError, match="already holds an adapter"):
        save_adapter(tmp_path, config, good, 3, 7, "base")
