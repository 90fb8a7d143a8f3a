"""A run that goes on does so from the weights and with the examples that it began with."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.train.defaults import sft as defaults
from proxy_jax.errors import InputError
from tests import trios
from train import sft
from train.examples import Example

TOKENS = np.asarray([1, 5, 7, 2], np.int32)
EXAMPLE = Example(TOKENS, np.asarray([False, False, True, True]), 1)


@pytest.fixture
def config(tmp_path: Path):
    trios.make_model("llama", 320, 0, num_hidden_layers=1).save_pretrained(tmp_path / "m")
    trios.make_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    config = defaults()
    config.base, config.output_dir = str(tmp_path / "m"), str(tmp_path / "run")
    config.data.path = str(tmp_path / "rows.jsonl")
    return config


def begin(config) -> None:
    with contextlib.closing(sft.open_run(config)) as run:
        run.check_examples([EXAMPLE])


def test_the_same_goes_on(config, tmp_path):
    begin(config)
    begin(config)
    shutil.move(tmp_path / "m", tmp_path / "away")
    shutil.copytree(tmp_path / "away", tmp_path / "m")  # copied anew, with other times
    begin(config)


@pytest.mark.parametrize("role", ["base", "consistent.base"])
def test_a_weight_that_is_replaced(config, tmp_path, role):
    if role == "consistent.base":
        shutil.copytree(tmp_path / "m", tmp_path / "large")
        config.consistent.base, config.consistent.alpha_train = str(tmp_path / "large"), 1.0
    begin(config)
    file = tmp_path / ("m" if role == "base" else "large") / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"holds a run of another config \({role}.model: \w+"):
        begin(config)


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(EXAMPLE, tokens=TOKENS[::-1].copy()),
        dataclasses.replace(EXAMPLE, trained=np.ones(4, bool)),
    ],
    ids=["tokens", "what is learnt"],
)
def test_other_examples_of_the_same_rows(config, other):
    begin(config)
    with contextlib.closing(sft.open_run(config)) as run:
        for examples in ([other], [EXAMPLE, EXAMPLE]):
            with pytest.raises(InputError, match="other examples than those that the run began"):
                run.check_examples(examples)
        run.check_examples([EXAMPLE])


def test_other_rows(config, tmp_path):
    begin(config)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "c"}) + "\n")
    with pytest.raises(InputError, match=r"holds a run of another config \(data: \w+"):
        begin(config)
