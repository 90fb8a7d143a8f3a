"""adapter_config.json as peft writes it: what is adapted, at what rank and scale, against peft."""

import json
from typing import Any

import peft
import pytest

from proxy_jax.checkpoints.peft_config import read_settings
from proxy_jax.errors import InputError
from tests.models import families

LAYER = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model():
    return families.torch_model("llama")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["self_attn.q_proj", LAYER, "nothing", "proj"]},
        {"target_modules": r".*\.[02]\..*(q|up)_proj"},
        {"target_modules": r"layers.*q_proj|model\.layers\.1\.mlp\..*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2, 9]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["v_proj", LAYER], "layers_to_transform": [2]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "lay.*"]},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "2.mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.(0|1)\..*"},
        {"exclude_modules": "layers"},
        {"use_rslora": True},
        {"lora_alpha": 2.5, "use_rslora": True, "rank_pattern": {"v_proj": 9}},
        {"rank_pattern": {r"layers\.1\.self_attn\..*": 2, "q_proj": 4, "nothing": 7}},
        {"rank_pattern": {f"^{LAYER}": 2, "model.layers.0.mlp.up_proj": 4, "_proj": 9}},
        {"alpha_pattern": {"0.self_attn": 9, "model.layers": 3, "up_proj": 2}},
        {"alpha_pattern": {"self_attn": 3, "q_proj": 1.5, "0.self_attn.(q|v)_proj": 4}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*1.*": 5}, "use_rslora": True},
        {"fan_in_fan_out": True, "ensure_weight_tying": True, "lora_dropout": 0.3},
    ],
)
def test_as_peft_reads_it(model, tmp_path, fields):
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]}
    config = peft.LoraConfig(**(settings | fields))
    config.save_pretrained(str(tmp_path))
    ours = read_settings(tmp_path / "adapter_config.json")
    # As saved: the fields' order counts, and sets have become lists.
    saved = peft.LoraConfig.from_pretrained(str(tmp_path))
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    adapted = peft.get_peft_model(model, saved)
    try:
        layers = {
            name.removeprefix("base_model.model."): layer
            for name, layer in adapted.named_modules()
            if isinstance(layer, peft.tuners.lora.LoraLayer)
        }
    finally:
        adapted.unload()
    assert layers
    assert {name for name in names if ours.targets(name)} == set(layers)
    for name, layer in layers.items():
        assert ours.rank_of(name) == layer.r["default"]
        assert ours.scale_of(name) == layer.scaling["default"]


def test_fields_of_other_releases(tmp_path):
    """null is "not this one", whoever added the field; the first adapters had two more."""
    file = tmp_path / "adapter_config.json"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    more = {"enable_lora": None, "merge_weights": False, "a_later_field": None, "bias": None}
    file.write_text(json.dumps(config | more))
    assert read_settings(file).scale_of(LAYER) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": None}, "peft_type is missing"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"a_later_field": False}, "a_later_field=False is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\] is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=.* is not supported"),
        ({"megatron_config": {}}, "megatron_config={} is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not"),
        ({"r": 0}, "r must be between 1 and"),
        ({"r": 2.5}, "r must be an integer, not 2.5"),
        ({"r": True}, "r must be an integer, not True"),
        ({"r": None}, "r is missing"),
        ({"r": 10**400}, "r must be between 1 and"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"lora_alpha": -8}, "lora_alpha must be above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be finite"),
        ({"lora_alpha": 1e39}, "lora_alpha must be at most 3.4"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, not '8'"),
        ({"lora_dropout": 2}, "lora_dropout must be between 0 and 1"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern: q_proj must be an integer"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is not a regular expression"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern: q_proj must be above 0"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": 5}, "target_modules must be a list, not 5"),
        ({"target_modules": ["q_proj", 5]}, "target_modules must hold str values, not 5"),
        ({"target_modules": "(q_proj"}, r"'\(q_proj' is not a regular expression"),
        ({"exclude_modules": {"q": 1}}, "exclude_modules must be a list"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be an integer, not '1'"),
        ({"layers_to_transform": [True]}, "layers_to_transform must hold int values, not True"),
        ({"layers_pattern": "layers"}, "layers_pattern without layers_to_transform"),
        ({"layers_to_transform": 1, "layers_pattern": "["}, r"'\[' is not a regular expression"),
        ({"layers_to_transform": 1, "target_modules": "q"}, "layers_to_transform needs a list"),
    ],
)
def test_what_is_refused(tmp_path, fields, message):
    file = tmp_path / "adapter_config.json"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    file.write_text(json.dumps(config | fields))
    with pytest.raises(InputError, match=message) as caught:
        read_settings(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
