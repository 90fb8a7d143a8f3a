"""Experts on disk: transformers, peft and our own loader agree on what was written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxy_jax.checkpoints import adapters, safetensors
from proxy_jax.checkpoints.adapters import with_adapter
from proxy_jax.checkpoints.loading import load_params
from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint
from proxy_jax.errors import InputError
from proxy_jax.models.config import Rope
from proxy_jax.models.decoder import apply, init
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import is_adapted
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import ModelSpec, load_trio
from tests import trios
from tests.models import families
from train.export import Lora, check_export, export_expert

ONE = Placement(make_mesh({"data": 1}))
EIGHT = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
TOKENS = np.arange(24).reshape(2, 12) % 90
POSITIONS = np.broadcast_to(np.arange(12), (2, 12))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return trios.make_tokenizer()


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A tiny base on disk, and an adapter on it that peft made.

    Attributes:
      base, adapter: their directories.
      logits: of peft's model, on TOKENS.
      weights: of the model that peft merged.
    """

    base: Path
    adapter: Path
    logits: np.ndarray
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Tuned:
    directory = tmp_path_factory.mktemp("tuned")
    plain = trios.make_model("llama", 320, 0)
    plain.save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    settings = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj", "up_proj"])
    model: Any = peft.get_peft_model(plain, settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.3)
    model.save_pretrained(directory / "adapter")
    before = logits_of(model)
    return Tuned(
        directory / "base", directory / "adapter", before, model.merge_and_unload().state_dict()
    )


def logits_of(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def loaded(tuned: Tuned, place: Placement, *, stacked: bool) -> tuple[Any, Any, Lora]:
    """Config and weights of the base, and the adapter by itself, as training has them."""
    checkpoint = SafetensorsCheckpoint(tuned.base)
    config = config_from_hf(checkpoint.hf_config)
    params = load_params([checkpoint], config, "float32", place, stacked=stacked)

    def pairs(tree: Any) -> Any:
        if isinstance(tree, tuple):
            return tuple(pairs(layer) for layer in tree)
        if is_adapted(tree):
            return {"a": tree.a, "b": tree.b}
        if not isinstance(tree, dict):
            return None
        found = {key: pairs(value) for key, value in tree.items()}
        return {key: value for key, value in found.items() if value}

    adapted = with_adapter(params, tuned.adapter, config, "float32", place)
    return config, params, Lora(pairs(adapted), rank=3, alpha=7, dropout=0.1)


def scores(spec: ModelSpec) -> np.ndarray:
    """Logits of a model as decoding loads it."""
    trio = load_trio(spec)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(apply, static_argnums=0)
        return np.asarray(run(trio.passes[0].config, trio.params[0], TOKENS, POSITIONS)[0])


@pytest.mark.parametrize(
    ("place", "stacked"), [(ONE, False), (ONE, True), (EIGHT, False), (EIGHT, True)]
)
def test_a_lora_expert(tuned, tokenizer, tmp_path, place, stacked):
    config, params, lora = loaded(tuned, place, stacked=stacked)
    path = tmp_path / "new" / "expert"
    message = export_expert(
        path, config, params, tokenizer, str(tuned.base), lora=lora, dtype="float32", eos_ids=(7,)
    )
    assert message == f"{path}: merged weights, float32; {path}/adapter: the LoRA adapter"
    assert [file.name for file in path.parent.iterdir()] == ["expert"]

    merged: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    model, report = merged
    assert not any(report.values()), report
    np.testing.assert_allclose(logits_of(model), tuned.logits, atol=1e-4)
    assert model.generation_config.eos_token_id == [trios.EOS, 7]
    assert AutoTokenizer.from_pretrained(path)("apples").input_ids == tokenizer("apples").input_ids
    base = AutoModelForCausalLM.from_pretrained(tuned.base)
    attached = peft.PeftModel.from_pretrained(base, str(path / "adapter"))
    np.testing.assert_allclose(logits_of(attached), tuned.logits, atol=1e-4)

    ours = scores(ModelSpec(str(path)))
    np.testing.assert_allclose(ours, tuned.logits, atol=1e-4)
    with_it = scores(ModelSpec(str(tuned.base), adapter=str(path / "adapter")))
    np.testing.assert_allclose(with_it, ours, atol=1e-4)
    assert np.abs(ours - scores(ModelSpec(str(tuned.base)))).max() > 0.1


def test_bfloat16_is_rounded_once(tuned, tokenizer, tmp_path):
    """Float32 training weights give peft's merged weights, rounded; the adapter keeps its bits."""
    config, params, lora = loaded(tuned, ONE, stacked=True)
    export_expert(tmp_path / "x", config, params, tokenizer, "base", lora=lora)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "x" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    same = []
    for name, weight in model.state_dict().items():
        expected = tuned.weights[name].bfloat16()
        if not any(module in name for module in ("q_proj", "o_proj", "up_proj")):
            assert torch.equal(weight, expected), name
        # A sum in another order may fall on the other side between two numbers.
        same.append((weight == expected).float().mean().item())
    assert min(same) > 0.998
    stored = safetensors.safe_open(
        tmp_path / "x" / "adapter" / "adapter_model.safetensors", framework="numpy"
    )
    theirs = safetensors.safe_open(tuned.adapter / "adapter_model.safetensors", framework="numpy")
    assert set(stored.keys()) == set(theirs.keys())
    for name in theirs.keys():  # noqa: SIM118 (not a mapping)
        np.testing.assert_array_equal(stored.get_tensor(name), theirs.get_tensor(name))


def test_a_bfloat16_base_does_not_limit_a_float32_export(tuned, tokenizer, tmp_path):
    config, params, lora = loaded(tuned, ONE, stacked=False)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    export_expert(tmp_path / "x", config, small, tokenizer, "base", lora=lora, dtype="float32")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    attached: Any = AutoModelForCausalLM.from_pretrained(tuned.base)
    with torch.no_grad():
        for weight in attached.parameters():  # and not the angles of RoPE, which are buffers
            weight.copy_(weight.bfloat16())
    attached = peft.PeftModel.from_pretrained(attached, str(tuned.adapter))
    np.testing.assert_allclose(logits_of(model), logits_of(attached), atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "qwen2"])
def test_a_fully_tuned_expert(build, tokenizer, tmp_path, name):
    """Families with tied heads, biases and four norms a block; every weight bit for bit."""
    reference = build(name)
    params = reference.load(EIGHT, stacked=True)
    message = export_expert(tmp_path / "x", reference.config, params, tokenizer, "base")
    assert message == f"{tmp_path}/x: weights, bfloat16"
    assert not (tmp_path / "x" / "adapter").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    for key, weight in families.torch_model(name).state_dict().items():
        assert torch.equal(model.state_dict()[key], weight.bfloat16()), key


def with_factors(config: Any) -> Any:
    """As a GGUF file describes a Llama 3 model."""
    count = config.head_dim // 2
    return dataclasses.replace(config, ropes=(Rope(kind="factors", factors=(2.0,) * count),))


def test_only_the_adapter_of_what_config_json_cannot_say(tuned, tokenizer, tmp_path):
    config, params, lora = loaded(tuned, ONE, stacked=False)
    path = tmp_path / "x"
    check_export(path, with_factors(config), lora=True)
    message = export_expert(path, with_factors(config), params, tokenizer, "model.gguf", lora=lora)
    assert "the LoRA adapter only, not merged weights: the model has one rope factor" in message
    assert [file.name for file in path.iterdir()] == ["adapter"]
    with_it = scores(ModelSpec(str(tuned.base), adapter=str(path / "adapter")))
    np.testing.assert_allclose(with_it, tuned.logits, atol=1e-4)


def test_what_cannot_be_exported_is_refused(tuned, tokenizer, tmp_path):
    config, params, _ = loaded(tuned, ONE, stacked=False)
    for run in (
        lambda path, config: check_export(path, config, lora=False),
        lambda path, config: export_expert(path, config, params, tokenizer, "base"),
    ):
        with pytest.raises(InputError, match="export: the model has one rope factor"):
            run(tmp_path / "x", with_factors(config))
        (tmp_path / "taken").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="taken: exists; export into another directory"):
            run(tmp_path / "taken", config)
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_weights_that_the_dtype_does_not_hold(tuned, tokenizer, tmp_path):
    config, params, _ = loaded(tuned, ONE, stacked=False)
    params = params | {"embedding": params["embedding"].at[3, 4].set(1e5)}
    with pytest.raises(InputError, match="not finite in float16; use another export_dtype"):
        export_expert(tmp_path / "x", config, params, tokenizer, "base", dtype="float16")
    assert not list(tmp_path.iterdir())
    export_expert(tmp_path / "x", config, params, tokenizer, "base", dtype="bfloat16")


class Killed(BaseException):
    """What no handler in the export catches."""


@pytest.mark.parametrize("module", [safetensors, adapters])
@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(28, "No space left on device"), InputError), (Killed(), Killed)]
)
def test_an_interrupted_export(tuned, tokenizer, tmp_path, monkeypatch, module, error, raised):
    """Leaves nothing, and the next one is whole."""
    config, params, lora = loaded(tuned, ONE, stacked=False)
    save, path = module.save_file, tmp_path / "x"

    def half(tensors: dict[str, np.ndarray], file: Path, metadata: Any = None) -> None:
        save(dict(list(tensors.items())[:2]), file, metadata=metadata)
        assert not path.exists()
        raise error

    monkeypatch.setattr(module, "save_file", half)
    message = "x: cannot write .*No space left" if raised is InputError else None
    with pytest.raises(raised, match=message):
        export_expert(path, config, params, tokenizer, "base", lora=lora)
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(module, "save_file", save)
    # What a process that was killed outright leaves is not mistaken for an export, nor in the way.
    (tmp_path / "x.new").mkdir()
    (tmp_path / "x.new" / "model.safetensors").write_bytes(b"half")
    export_expert(path, config, params, tokenizer, "base", lora=lora)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (path / "adapter" / "adapter_config.json").exists()


def test_weights_that_were_never_on_disk(tuned, tokenizer, tmp_path):
    """Random weights of `init`, not loaded from a checkpoint whose layout they could share."""
    config, _, _ = loaded(tuned, ONE, stacked=False)
    params = init(config, jax.random.key(3))
    export_expert(tmp_path / "x", config, params, tokenizer, "base", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(apply, static_argnums=0)(config, params, TOKENS, POSITIONS)[0]
    np.testing.assert_allclose(logits_of(model), ours, atol=1e-4)
