"""Loading parameters: the right numbers, only the needed slices, and errors that name a tensor."""

import collections
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from proxy_jax.checkpoints import loading
from proxy_jax.checkpoints.loading import load_params, model_config, open_checkpoint
from proxy_jax.checkpoints.names import tensors
from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint, export
from proxy_jax.errors import InputError
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.quantized import map_weights
from proxy_jax.models.turned import Turned
from proxy_jax.sharding import Placement, ShardingRules, make_mesh
from tests.models.families import torch_model

ONE = Placement(make_mesh({"data": 1}))
EIGHT = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
QUERY = "model.layers.1.self_attn.q_proj.weight"


def load(path: Path, dtype=np.float32, place: Placement = ONE, *, stacked: bool = False):
    checkpoint = SafetensorsCheckpoint(path)
    config = config_from_hf(checkpoint.hf_config)
    return load_params([checkpoint], config, dtype, place, stacked=stacked)


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_export_and_reload_give_the_same_bits(reference, tmp_path):
    export(reference.config, reference.params, tmp_path)
    params = load(tmp_path)
    assert_same(params, reference.params)


def test_stacked_is_the_layers_one_on_another(reference):
    stacked = reference.load(ONE, stacked=True)
    layers = reference.params["layers"]
    for i, layer in enumerate(layers):
        of_stack = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], stacked["layers"])
        assert_same(of_stack, layer)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked["layers"])} == {len(layers)}
    np.testing.assert_array_equal(stacked["embedding"], reference.params["embedding"])


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "stacked"])
def test_models_side_by_side(build, tmp_path, stacked):
    reference = build("smollm3")
    export(reference.config, jax.tree.map(lambda leaf: 2 * leaf, reference.params), tmp_path)
    checkpoints = [reference.checkpoint, SafetensorsCheckpoint(tmp_path)]
    sizes: list[int] = []
    both = load_params(
        checkpoints, reference.config, np.float32, EIGHT, stacked=stacked, progress=sizes.append
    )
    one = reference.load(ONE, stacked=stacked)
    assert_same(both, jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), one))
    assert sum(sizes) == 2 * sum(weight.numel() for weight in reference.model.parameters())
    assert len(sizes) == len(jax.tree.leaves(one))
    (alone,) = checkpoints[1:]
    single = load_params([alone], reference.config, np.float32, ONE, stacked=stacked)
    assert_same(single, jax.tree.map(lambda leaf: 2 * leaf, one))


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "stacked"])
@pytest.mark.parametrize("place", [ONE, EIGHT], ids=["one device", "eight"])
def test_turned_weights_are_the_same_numbers(build, stacked, place):
    reference = build("llama")
    arguments = [reference.checkpoint], reference.config, "bfloat16", place
    sizes: list[int] = []
    ours = load_params(*arguments, stacked=stacked, turned=True, progress=sizes.append)
    plain = load_params(*arguments, stacked=stacked)

    def turn(part, lead):
        def of_weight(leaf, inputs):
            return Turned(np.moveaxis(leaf, range(lead, lead + inputs), range(-inputs, 0)))

        return map_weights(of_weight, jax.device_get(part))

    expected = turn(plain, 0) | {"layers": turn(plain["layers"], int(stacked))}
    assert_same(ours, expected)
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(plain))
    down = (ours["layers"] if stacked else ours["layers"][0])["mlp"]["down"].values
    parts = place.split("mlp") * place.split("embed")
    assert {part.data.size * parts for part in down.addressable_shards} == {down.size}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_dtypes_convert_as_torch_does(tmp_path, stored, wanted):
    model = torch_model("qwen2").to(stored)
    model.save_pretrained(tmp_path)
    params = load(tmp_path, wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    weights = {k: w.to(getattr(torch, wanted)).float() for k, w in model.state_dict().items()}
    attention = params["layers"][1]["attention"]
    query = np.asarray(attention["q"], np.float32).transpose(1, 2, 0).reshape(48, 48)
    np.testing.assert_array_equal(query, weights[QUERY])
    bias = np.asarray(attention["q_bias"], np.float32).reshape(48)
    np.testing.assert_array_equal(bias, weights[QUERY.replace("weight", "bias")])
    embedding = np.asarray(params["embedding"], np.float32)
    np.testing.assert_array_equal(embedding, weights["model.embed_tokens.weight"])


def test_the_language_model_of_a_vision_language_checkpoint(build, tmp_path):
    text = build("gemma3")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text.model.config,
        vision_config={"model_type": "siglip_vision_model", **vision},
        mm_tokens_per_image=4,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.model.language_model.load_state_dict(text.model.model.state_dict())
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any("vision_tower" in name for name in stored)
    assert not any(name.startswith("model.layers.") for name in stored)
    assert config_from_hf(SafetensorsCheckpoint(tmp_path).hf_config) == text.config
    assert_same(load(tmp_path), text.params)


class Counting(SafetensorsCheckpoint):
    """A checkpoint that keeps what is read of it."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.reads: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = super().read(name, index)
        self.reads[name].append(part)
        return part


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "stacked"])
def test_each_device_reads_its_own_part(build, stacked):
    reference = build("llama_yarn_biases")
    checkpoint = Counting(reference.path)
    params = load_params([checkpoint], reference.config, np.float32, EIGHT, stacked=stacked)
    whole = {name: weight.numpy() for name, weight in reference.model.state_dict().items()}
    parts = {"q_proj.weight": 4, "o_proj.weight": 4, "down_proj.weight": 4, "q_proj.bias": 2}
    parts |= {"up_proj.bias": 2, "o_proj.bias": 1, "layernorm.weight": 1, "embed_tokens.weight": 4}
    for ending, count in parts.items():
        names = [name for name in checkpoint.reads if name.endswith(ending)]
        assert names, ending
        for name in names:
            reads = checkpoint.reads[name]
            assert {part.size for part in reads} == {whole[name].size // count}, name
            assert len({part.tobytes() for part in reads}) == count, name
            assert len(reads) <= 8, name
    of_one = reference.load(ONE, stacked=stacked)
    assert_same(params, of_one)


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "stacked"])
def test_a_piece_at_a_time(build, monkeypatch, stacked):
    reference = build("llama_yarn_biases")
    monkeypatch.setattr(loading, "_PIECE", 500)
    checkpoint = Counting(reference.path)
    params = load_params([checkpoint], reference.config, np.float32, EIGHT, stacked=stacked)
    assert_same(params, reference.load(ONE, stacked=stacked))
    # A head is not cut: [12, 48] of q_proj, which fsdp halves, is the smallest piece of it.
    assert max(part.size for parts in checkpoint.reads.values() for part in parts) <= 12 * 48
    assert len(checkpoint.reads["model.embed_tokens.weight"]) > 8


def test_rules_decide_what_is_split(build):
    reference = build("llama")
    place = Placement(make_mesh({"tensor": 2}), ShardingRules(kv_heads=None, vocab=None))
    attention = reference.load(place, stacked=False)["layers"][0]["attention"]
    assert attention["k"].sharding.is_fully_replicated
    assert attention["q"].addressable_shards[0].data.shape == (48, 2, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(QUERY), rf"tensor {QUERY} is missing"),
        (
            lambda w: [w.pop(name) for name in list(w) if "q_proj" in name],
            r"tensor model\.layers\.0\.self_attn\.q_proj\.weight and 2 more is missing",
        ),
        (
            lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(48)}),
            r"tensor model\.layers\.1\.self_attn\.q_proj\.bias is not part of a model",
        ),
        (
            lambda w: w.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(76, 48)}),
            r"tensor model\.layers\.3\.mlp\.up_proj\.weight is not part of a model",
        ),
        (
            lambda w: w.update({QUERY: torch.zeros(48, 47)}),
            rf"tensor {QUERY} has shape \(48, 47\), the config asks for \(48, 48\)",
        ),
        (
            lambda w: w.update({"model.embed_tokens.weight": torch.zeros(105, 48)}),
            r"model\.embed_tokens\.weight has shape \(105, 48\), the config asks for \(106, 48\)",
        ),
    ],
    ids=["missing", "three missing", "bias", "layer", "matrix shape", "vocabulary"],
)
def test_a_wrong_tensor_is_named(build, tmp_path, change, message):
    path = shutil.copytree(build("llama").path, tmp_path / "changed")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, path / "model.safetensors")
    with pytest.raises(InputError, match=f"changed: .*{message}"):
        load(path)


def test_a_tied_head_that_is_stored_once_more_is_no_error(build, tmp_path):
    tied, untied = build("qwen2"), build("qwen2_upper_windows")
    path = shutil.copytree(tied.path, tmp_path / "twice")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, path / "model.safetensors")
    assert_same(load(path), tied.params)
    assert "head" in untied.params
    assert "head" not in tied.params


def untied_by_the_file(source: Path, path: Path) -> torch.Tensor:
    """Copies a tied model and gives the file a head of its own."""
    shutil.copytree(source, path)
    weights = safetensors.torch.load_file(path / "model.safetensors")
    head = weights["model.embed_tokens.weight"].flip(0).clone()
    weights["lm_head.weight"] = head
    safetensors.torch.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return head


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "llama_yarn_mscale_tied"])
def test_a_head_of_the_file_is_the_models(build, tmp_path, name):
    untied_by_the_file(build(name).path, tmp_path / "m")
    checkpoint = SafetensorsCheckpoint(tmp_path / "m")
    config = model_config(checkpoint)
    assert not config.tied_head
    params = load_params([checkpoint], config, np.float32, ONE, stacked=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    np.testing.assert_array_equal(params["head"].T, theirs.lm_head.weight.detach())
    np.testing.assert_array_equal(params["embedding"], theirs.model.embed_tokens.weight.detach())
    export(config, params, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(params["head"].T, again.lm_head.weight.detach())


def test_a_head_that_differs_late_or_in_shape(build, tmp_path, monkeypatch):
    path = shutil.copytree(build("qwen2").path, tmp_path / "m")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    monkeypatch.setattr(loading, "_PIECE", 500)

    def tied(head: torch.Tensor) -> bool:
        stored = weights | {"lm_head.weight": head}
        safetensors.torch.save_file(stored, path / "model.safetensors")
        return model_config(SafetensorsCheckpoint(path)).tied_head

    assert tied(embedding.clone())
    last = embedding.clone()
    last[-1, -1] += 1
    assert not tied(last)
    assert not tied(embedding[:-1].clone())
    checkpoint = SafetensorsCheckpoint(path)
    config = model_config(checkpoint)
    with pytest.raises(InputError, match=r"lm_head\.weight has shape \(105, 48\)"):
        load_params([checkpoint], config, np.float32, ONE, stacked=False)


def test_a_head_that_was_not_on_disk_when_the_config_was_read_is_refused(build, tmp_path):
    untied_by_the_file(build("qwen2").path, tmp_path / "m")
    checkpoint = SafetensorsCheckpoint(tmp_path / "m", fetch=lambda: None)
    config = model_config(checkpoint)
    assert config.tied_head
    with pytest.raises(InputError, match=r"m: tensor lm_head\.weight is another than the embed"):
        load_params([checkpoint], config, np.float32, ONE, stacked=False)


def test_every_parameter_has_one_tensor(reference):
    """The table covers the params, and the names are those that transformers stores."""
    table = tensors(reference.config)
    assert len({tensor.path for tensor in table}) == len(jax.tree.leaves(reference.params))
    stored = set(reference.model.state_dict())
    if reference.config.tied_head:
        stored.remove("lm_head.weight")
    assert sorted(tensor.name for tensor in table) == sorted(stored)


def test_what_open_checkpoint_accepts(build, tmp_path):
    path = build("llama").path
    assert isinstance(open_checkpoint(str(path)), SafetensorsCheckpoint)
    for nothing in (tmp_path / "absent", tmp_path / "absent.gguf", "./a/b", "a/b/c", "alone"):
        with pytest.raises(InputError, match=r"no such file or directory"):
            open_checkpoint(str(nothing))
    with pytest.raises(InputError, match="~nobody-here"):
        open_checkpoint("~nobody-here/model")
    with pytest.raises(InputError, match="nobody/nothing: no such directory, and the hub"):
        open_checkpoint("nobody/nothing")
