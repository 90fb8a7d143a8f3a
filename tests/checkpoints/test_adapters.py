"""LoRA adapters that peft wrote, against peft's own logits."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from proxy_jax.checkpoints.adapters import with_adapter
from proxy_jax.errors import InputError
from proxy_jax.models.decoder import apply
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
