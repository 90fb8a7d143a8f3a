"""What is refused of a training config before anything is loaded."""

import copy

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.train.defaults import sft as defaults
from proxy_jax.errors import InputError
from train.config import check_benchmark, check_config, check_values
from train.optimizer import OptimizerConfig


def config_with(**fields):
    """The default config, with fields of any type; "part__field" is one of a part."""
    values = copy.deepcopy(defaults().to_dict())
    values["base"], values["output_dir"] = "model", "run"
    values["data"]["path"] = "rows.jsonl"
    for name, value in fields.items():
        part, _, field = name.partition("__")
        if field:
            values[part][field] = value
        else:
            values[part] = value
    return ConfigDict(values)


def test_the_defaults_and_the_edges_of_each_range():
    check_config(config_with())
    check_benchmark(config_with())
    check_values(defaults())
    edges = {"optimizer__b1": 0.0, "optimizer__b2": 0.99999, "lora__dropout": 0.99}
    check_config(config_with(**edges, seed=2**32 - 1, lora__rank=1, keep=1, mesh__fsdp=-1))
    check_config(config_with(max_length=2, held_out=0, eval_every=0, replicate=("kv_heads",)))
    check_config(config_with(consistent__alpha_train=-0.5, consistent__base="large"))
    for dtype in ("float32", "bfloat16", "float16"):
        check_config(config_with(compute_dtype=dtype, export_dtype=dtype))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"export_dtype": "int8"}, "config: export_dtype 'int8' is not supported"),
        ({"export_dtype": "bf16"}, "config: export_dtype 'bf16' is not supported"),
        ({"compute_dtype": "int32"}, "config: compute_dtype 'int32' is not supported"),
        ({"compute_dtype": "float64"}, "config: compute_dtype 'float64' is not supported"),
        ({"epochs": 0}, "config: epochs must be between 1 and"),
        ({"batch_size": 0}, "config: batch_size must be between 1 and"),
        ({"batch_size": 2.5}, "config: batch_size must be an integer, not 2.5"),
        ({"batch_size": 8.0}, "config: batch_size must be an integer, not 8.0"),
        ({"batch_size": True}, "config: batch_size must be an integer, not True"),
        ({"batch_size": "8"}, "config: batch_size must be an integer, not '8'"),
        ({"batch_size": 10**30}, "config.batch_size is out of range: 10"),
        ({"batch_size": 10**5000}, "config.batch_size is out of range: an integer of more"),
        ({"batch_size": np.int64(8)}, "config.batch_size must be a number, text"),
        ({"accumulate": 0}, "config: accumulate must be between 1 and"),
        ({"accumulate": 3}, "batch_size 128 does not divide into 3 micro-batches"),
        ({"log_every": 0}, "config: log_every must be between 1 and"),
        ({"checkpoint_every": 0}, "config: checkpoint_every must be between 1 and"),
        ({"keep": 0}, "config: keep must be between 1 and"),
        ({"eval_every": -1}, "config: eval_every must be between 0 and"),
        ({"held_out": -1}, "config: held_out must be between 0 and"),
        ({"max_length": 1}, "config: max_length must be between 2 and"),
        ({"max_length": 10**12}, "config: max_length must be between 2 and"),
        ({"seed": -1}, "config: seed must be between 0 and 4294967295"),
        ({"seed": 2**32}, "config: seed must be between 0 and 4294967295"),
        ({"packing": 1}, "config: packing must be true or false, not 1"),
        ({"data__limit": -5}, "config: data: limit must be between 0 and"),
        ({"data__format": "alpaca"}, "config: data: format 'alpaca' is not supported"),
        ({"data__skip_invalid": "no"}, "config: data: skip_invalid must be true or false"),
        ({"data__chat_template": "a\ud800"}, r"config.data.chat_template: not text, .*\\ud800"),
        ({"data__path": "a\0b"}, r"config.data.path: not text, .*\\x00"),
        ({"lora__rank": -1}, "config: lora: rank must be between 0 and"),
        ({"lora__rank": 10**9}, "config: lora: rank must be between 0 and"),
        ({"lora__alpha": 0.0}, "config: lora: alpha must be between"),
        ({"lora__alpha": float("inf")}, "config.lora.alpha must be finite, not inf"),
        ({"lora__dropout": 1.0}, "config: lora: dropout must be between 0 and"),
        ({"lora__dropout": -0.5}, "config: lora: dropout must be between 0 and"),
        ({"lora__modules": ("q",)}, "lora.modules: 'q' is not one of"),
        ({"lora__modules": "q_proj"}, "config: lora: modules must be a list"),
        ({"lora__rank": 2, "lora__modules": ()}, "lora.modules is empty"),
        ({"optimizer__learning_rate": 0.0}, "optimizer: learning_rate must be between"),
        ({"optimizer__learning_rate": 1e39}, "optimizer: learning_rate must be between"),
        ({"optimizer__learning_rate": float("nan")}, "config.optimizer.learning_rate must be fin"),
        ({"optimizer__schedule": "steep"}, "schedule 'steep' is unknown"),
        ({"optimizer__warmup_ratio": 1.5}, "optimizer: warmup_ratio must be between 0 and 1"),
        ({"optimizer__weight_decay": -0.1}, "optimizer: weight_decay must be between 0"),
        ({"optimizer__max_grad_norm": -1.0}, "optimizer: max_grad_norm must be between 0"),
        ({"optimizer__b1": 2.0}, "optimizer: b1 must be between 0 and"),
        ({"optimizer__b2": 1.0}, "optimizer: b2 must be between 0 and"),
        ({"optimizer__eps": -1e-8}, "optimizer: eps must be between"),
        ({"optimizer__eps": 1e-60}, "optimizer: eps must be between"),
        ({"optimizer__momentum": 0.9}, "optimizer: 'momentum' is not one of"),
        (
            {"consistent__alpha_train": 1.0},
            "consistent.alpha_train and consistent.base go together",
        ),
        ({"mesh__data": 0}, "config: mesh: data must be at least 1, or -1, not 0"),
        ({"mesh__data": -2}, "config: mesh: data must be between -1 and"),
        ({"mesh__data": -1, "mesh__fsdp": -1}, "config: mesh: one axis may be -1, not several"),
        ({"mesh__model": 2}, "mesh axis 'model' is unknown"),
        ({"replicate": ("head",)}, "replicate: 'head' is not one of batch, "),
        ({"replicate": "heads"}, "config: replicate must be a list"),
        ({"architecture": {"eps": float("inf")}}, "config.architecture.eps must be finite"),
        ({"remat": "some"}, "remat 'some' is unknown"),
        ({"layers": None}, "config: layers is missing"),
        ({"data": ConfigDict()}, "config: path is missing|config: data: path is missing"),
        ({"lora": 3}, "config: lora must be an object, not 3"),
    ],
)
def test_values_that_are_refused(fields, message):
    with pytest.raises(InputError, match=f"^{message}") as error:
        check_config(config_with(**fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted({*defaults()} - {"benchmark"}))
def test_a_field_that_is_missing_is_named(name):
    """A config of another program, or of an older version."""
    config = config_with()
    del config[name]
    with pytest.raises(InputError, match=f"^config: {name} is missing$"):
        check_config(config)


@pytest.mark.parametrize("part", ["data", "lora", "optimizer", "consistent"])
def test_a_field_of_a_part_that_is_missing_is_named(part):
    for name in defaults()[part]:
        config = config_with()
        del config[part][name]
        with pytest.raises(InputError, match=f"{part}: {name} is missing$"):
            check_config(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "config: benchmark: steps must be between 1 and"),
        ({"compare": "tf"}, "benchmark.compare 'tf' is unknown"),
        ({"remat": ("some",)}, "benchmark.remat 'some' is unknown"),
        ({"ranks": (-1,)}, "benchmark.ranks must be between 0 and"),
        ({"ranks": ("8",)}, "config: benchmark: ranks must hold int values"),
    ],
)
def test_benchmarks_that_are_refused(fields, message):
    config = config_with(**{f"benchmark__{name}": value for name, value in fields.items()})
    with pytest.raises(InputError, match=f"^{message}"):
        check_benchmark(config)


def test_the_optimizer_checks_itself():
    """It is the library's, too."""
    with pytest.raises(InputError, match=r"^optimizer: b1 must be finite, not nan"):
        OptimizerConfig(b1=float("nan"))
