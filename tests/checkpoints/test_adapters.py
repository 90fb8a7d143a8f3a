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

from proxy_jax.checkpoints.adapters import read_adapter, save_adapter, with_adapter
from proxy_jax.checkpoints.names import tensors
from proxy_jax.errors import InputError
from proxy_jax.models.decoder import apply
from proxy_jax.models.lora import Adapted, is_adapted, merge
from proxy_jax.sharding import Placement, make_mesh
from tests.models import families

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ONE = Placement(make_mesh({"data": 1}))
TOKENS = np.arange(24).reshape(2, 12) % 90
POSITIONS = np.broadcast_to(np.arange(12), (2, 12))


def adapted(reference, directory, targets, **fields):
    """A peft model with random A and B, saved; returns it in torch."""
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 7, "target_modules": targets} | fields))
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


# Ranks and scales that differ between weights and between layers; a layer without an adapter.
UNEVEN = {
    "layers_to_transform": [0, 2],
    "use_rslora": True,
    "rank_pattern": {"^model.layers.2.self_attn.q_proj": 5, "v_proj": 2},
    "alpha_pattern": {r"layers\.0\.self_attn\.(q|v)_proj": 3, "up_proj": 1.5},
}


@pytest.mark.parametrize(
    ("name", "targets", "fields"),
    [("llama", ALL, {}), ("gemma3", ["q_proj", "o_proj"], {}), ("llama", ALL, UNEVEN)],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_logits_equal_pefts(build, tmp_path, name, targets, fields, stacked):
    reference = build(name)
    model = adapted(reference, tmp_path, targets, **fields)
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


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("targets", "fields"),
    [
        (["q_proj"], {"layers_to_transform": 1, "layers_pattern": "layers"}),
        (["self_attn.o_proj", "model.layers.1.mlp.up_proj"], {}),
        (r".*\.[12]\..*(q|down)_proj", {"exclude_modules": r".*1\.mlp.*", "fan_in_fan_out": True}),
        (["q_proj", "v_proj"], {"rank_pattern": {"0.self_attn.q_proj": 6}, "lora_alpha": 2.5}),
        (["k_proj", "up_proj"], {"alpha_pattern": {"2.mlp.up_proj": 1}}),
        (["q_proj", "down_proj"], {"use_rslora": True}),
    ],
)
def test_what_peft_adapts(build, tmp_path, targets, fields, stacked):
    """Each weight with what the adapter adds to it, as peft merges them."""
    reference = build("llama")
    model = adapted(reference, tmp_path, targets, **fields).merge_and_unload()
    plain = reference.load(ONE, stacked=stacked)
    params = merge(with_adapter(plain, tmp_path, reference.config, "float32", ONE))
    theirs = model.state_dict()
    changed = 0
    for tensor in tensors(reference.config):
        key, *rest = tensor.path
        index, inner = (int(rest[0]), rest[1:]) if key == "layers" else (None, rest)
        ours, before = (tree[key] for tree in (params, plain))
        if index is not None and not stacked:
            ours, before = ours[index], before[index]
        for part in inner:
            ours, before = ours[part], before[part]
        if index is not None and stacked:
            ours, before = ours[index], before[index]
        changed += not np.array_equal(ours, before)
        expected = tensor.to_ours(theirs[tensor.name].numpy())
        np.testing.assert_allclose(ours, expected, atol=1e-5, err_msg=tensor.name)
    assert 0 < changed < 2 * reference.config.num_layers + 1


def test_scales_that_differ_are_in_b_before_it_is_rounded(build, tmp_path):
    """In bfloat16 stacked layers have the product of B and its scale, rounded once."""
    reference = build("llama")
    adapted(reference, tmp_path, ["q_proj"], alpha_pattern={"1.self_attn.q_proj": 2})
    plain = reference.load(ONE, stacked=True)
    leaf = with_adapter(plain, tmp_path, reference.config, jnp.bfloat16, ONE)["layers"]["attention"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for layer, alpha in enumerate([7, 2, 7]):
        b = stored[FIRST.replace("0", str(layer)).replace("lora_A", "lora_B")]
        expected = (b.astype("float32") * np.float32(alpha / 3)).astype(jnp.bfloat16)
        ours = np.asarray(leaf["q"].b[layer]).reshape(3, -1).T
        np.testing.assert_array_equal(ours, expected)
    assert leaf["q"].scale == 1


def edit_config(directory, **fields):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(directory, change):
    file = directory / "adapter_model.safetensors"
    stored = load_file(file)
    save_file(change(stored) or stored, file)


def renamed(directory, old, new):
    edit_tensors(directory, lambda t: {k.replace(old, new): v for k, v in t.items()})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIRST_B = FIRST.replace("lora_A", "lora_B")
SEEING = FIRST.replace("model.layers", "model.vision_tower.layers")  # of another part of a model
TINY = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    ("old", "new", "pattern"),
    [
        ("model.layers", "model.language_model.layers", "^model.language_model.layers.1"),
        (
            "model.model.layers",
            "model.language_model.model.layers",
            "^language_model.model.layers.1",
        ),
        (".weight", ".default.weight", "^model.layers.1"),
    ],
    ids=["vision", "vision, older", "adapter"],
)
def test_other_spellings(build, tmp_path, old, new, pattern):
    """Names of vision-language classes, in patterns too, and with the adapter's own name."""
    reference = build("gemma3")
    ranks = {"^model.layers.1.self_attn.q_proj": 2}
    adapted(reference, tmp_path, ["q_proj", "o_proj"], rank_pattern=ranks)
    expected = read_adapter(tmp_path, reference.config)
    renamed(tmp_path, old, new)
    edit_config(tmp_path, rank_pattern={f"{pattern}.self_attn.q_proj": 2})
    edit_tensors(tmp_path, lambda t: t | {SEEING: TINY})

    def check(ours, theirs):
        np.testing.assert_array_equal(ours.a, theirs.a)
        np.testing.assert_array_equal(ours.b, theirs.b)
        assert ours.scale == theirs.scale

    jax.tree.map(check, read_adapter(tmp_path, reference.config), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] is not supported"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has lm_head; supported are"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"target_modules has model\.embed_tokens"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not supported"),
    ],
)
def test_variants_that_peft_writes(build, tmp_path, fields, message):
    reference = build("llama")
    adapted(reference, tmp_path, ["q_proj"], **fields)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path, reference.config)


def test_embeddings_saved_along(build, tmp_path):
    reference = build("llama")
    adapted(reference, tmp_path, ["q_proj"]).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(InputError, match=r"lm_head\.weight is no A or B of LoRA that is"):
        read_adapter(tmp_path, reference.config)


def pickled(directory):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def cut(directory):
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def a_directory(directory, name):
    (directory / name).unlink()
    (directory / name).mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit_config(d, r=0), "r must be between 1 and"),
        (lambda d: edit_config(d, r=4), "q_proj.lora_A.weight has shape"),
        (
            lambda d: edit_config(d, rank_pattern={"1.self_attn.q_proj": 2}),
            r"\.1\..* and rank 2 ask",
        ),
        (lambda d: edit_config(d, target_modules=["q_proj", "k_proj"]), "k_proj.*is missing, but"),
        (lambda d: edit_config(d, target_modules=["k_proj"]), "does not target"),
        (lambda d: edit_config(d, exclude_modules=["0.self_attn.q_proj"]), "does not target"),
        (lambda d: edit_config(d, layers_to_transform=[1, 2]), r"\.0\..*does not target"),
        (
            lambda d: edit_tensors(d, lambda t: t.pop(FIRST) is None),
            "lora_A.weight is missing, but",
        ),
        (lambda d: edit_tensors(d, lambda t: t.pop(FIRST_B) is None), "lora_B.weight is missing"),
        (lambda d: edit_tensors(d, lambda t: t | {"x": TINY}), "tensor x is no A or B of LoRA"),
        (lambda d: renamed(d, "q_proj", "w_proj"), "w_proj.lora_A.weight adapts nothing that is"),
        (lambda d: renamed(d, "base_model.model.", ""), "tensor model.layers.* adapts nothing"),
        (lambda d: renamed(d, "layers.0", "language_model.layers.0"), "are of .* and of .*layers"),
        (
            lambda d: edit_tensors(d, lambda t: t | {FIRST.replace(".w", ".default.w"): TINY}),
            "lora_A.weight and .*lora_A.default.weight are one and the same|"
            "lora_A.default.weight and .*lora_A.weight are one and the same",
        ),
        (
            lambda d: edit_tensors(d, lambda t: t | {FIRST: t[FIRST].astype("int32")}),
            r"tensor \S*0.self_attn.q_proj.lora_A.weight is I32, not one of F64, F32, F16, BF16",
        ),
        (lambda d: edit_tensors(d, lambda t: t | {FIRST: t[FIRST] > 0}), "is BOOL, not one of"),
        (
            lambda d: edit_tensors(d, lambda t: t | {FIRST: t[FIRST].astype("complex64")}),
            "is C64, not one of",
        ),
        (lambda d: edit_tensors(d, lambda t: {SEEING: TINY}), "is missing"),
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
        (
            lambda d: a_directory(d, "adapter_config.json"),
            "adapter_config.json: not a regular file",
        ),
        (
            lambda d: (d / "adapter_model.safetensors").unlink(),
            "adapter_model.safetensors: no such",
        ),
        (
            lambda d: a_directory(d, "adapter_model.safetensors"),
            "adapter_model.* not a regular file",
        ),
        (cut, "adapter_model.safetensors: not a whole safetensors file"),
        (pickled, "adapter_model.bin: a pickle, which is never loaded; .*save_pretrained"),
    ],
)
def test_what_is_refused(build, tmp_path, damage, message):
    reference = build("llama")
    adapted(reference, tmp_path, ["q_proj"])
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read_adapter(tmp_path, reference.config)
    assert "\n" not in str(caught.value)


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
