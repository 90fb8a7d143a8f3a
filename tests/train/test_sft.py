"""The training program on a tiny model: what it leaves, and that interruptions change nothing."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from configs.train.defaults import sft as defaults
from proxy_jax.errors import InputError
from proxy_jax.trio import ModelSpec, load_trio
from tests import trios
from train import sft

WORDS = ("apples", "models", "answer", "seven", "France", "large", "small")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with a tokenizer, and rows to learn."""
    directory = tmp_path_factory.mktemp("base")
    trios.make_model("llama", 320, 0, num_hidden_layers=2).save_pretrained(directory)
    trios.make_tokenizer().save_pretrained(directory)
    rng = random.Random(0)
    rows = [
        {
            "prompt": f"Question: {' '.join(rng.choices(WORDS, k=4))}",
            "completion": rng.choice(WORDS),
        }
        for _ in range(40)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def config_of(base, directory, **fields):
    config = defaults()
    config.update(
        {
            "base": str(base),
            "output_dir": str(directory),
            "held_out": 8,
            "max_length": 64,
            "epochs": 3,
            "batch_size": 2,
            "compute_dtype": "float32",
            "export_dtype": "float32",
            "checkpoint_every": 3,
            "eval_every": 4,
        }
    )
    config.data.path = str(base / "rows.jsonl")
    config.optimizer.learning_rate = 3e-3
    for name, value in fields.items():
        part, _, field = name.partition("__")
        if field:
            config[part][field] = value
        else:
            config[part] = value
    return config


def records(directory, name="loss"):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[name] for r in map(json.loads, lines) if name in r}


@pytest.fixture(scope="module")
def lora_run(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    sft.main(config_of(base, directory, lora__rank=2, lora__dropout=0.1))
    return directory


def test_what_a_run_leaves(base, lora_run):
    losses = records(lora_run)
    assert list(losses) == list(range(1, len(losses) + 1))
    assert set(records(lora_run, "held_out_loss")) == {*range(4, len(losses), 4), len(losses)}
    assert (lora_run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((lora_run / "tensorboard").iterdir())
    # The decoder loads base + adapter, and transformers the merged directory, as one model.
    expert = lora_run / "expert"
    loaded = load_trio(ModelSpec(str(base), adapter=str(expert / "adapter")))
    model = transformers.AutoModelForCausalLM.from_pretrained(expert)
    rows = [json.loads(line) for line in (base / "rows.jsonl").read_text().splitlines()]
    tokenizer = loaded.trio.tokenizer
    total, count = 0.0, 0
    for row in rows[-8:]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_p = model(ids).logits[0].log_softmax(-1)
        chosen = log_p[:-1].gather(-1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, count = total - float(chosen.sum()), count + len(chosen)
    held = records(lora_run, "held_out_loss")
    assert held[max(held)] == pytest.approx(total / count, abs=1e-4)
    assert held[max(held)] < held[min(held)]


def test_full_fine_tuning_learns(base, tmp_path):
    sft.main(config_of(base, tmp_path, accumulate=2))
    losses = list(records(tmp_path).values())
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "expert"))
    assert all((before[name] != after[name]).any() for name in before)


def test_interrupted_runs_end_with_the_same_parameters(base, lora_run, tmp_path, monkeypatch):
    config = config_of(base, tmp_path, lora__rank=2, lora__dropout=0.1)
    whole = sft.train_step
    for stop in (5, 10, 11):

        def step(recipe, state, *rest, stop=stop):
            if int(state.step) == stop:
                raise KeyboardInterrupt
            return whole(recipe, state, *rest)

        monkeypatch.setattr(sft, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            sft.main(config)
    monkeypatch.setattr(sft, "train_step", whole)
    sft.main(config)
    assert records(tmp_path) == records(lora_run)
    name = Path("expert") / "adapter" / "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (lora_run / name).read_bytes()


def test_killed_at_random(base, lora_run, tmp_path):
    """SIGKILL in another process; the loop of five kills takes too long for every run."""
    config = config_of(base, tmp_path, lora__rank=2, lora__dropout=0.1)
    script = (
        "import json, sys; from configs.train.defaults import sft as defaults;"
        "from train import sft;"
        "config = defaults(); config.update(json.loads(sys.argv[1])); sft.main(config)"
    )
    command = [sys.executable, "-c", script, json.dumps(config.to_dict())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("[0-9]*")):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "expert").exists()
    sft.main(config)
    name = Path("expert") / "adapter" / "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (lora_run / name).read_bytes()


def test_nan_names_step_and_lines(base, tmp_path, monkeypatch):
    whole = sft.train_step

    def step(recipe, state, frozen, batch):
        state, metrics = whole(recipe, state, frozen, batch)
        return state, metrics | {"loss": metrics["loss"] * (np.nan if int(state.step) > 2 else 1)}

    monkeypatch.setattr(sft, "train_step", step)
    with pytest.raises(InputError, match=r"step 2: the loss is nan; rows of the batch: lines \[\d"):
        sft.main(config_of(base, tmp_path, lora__rank=2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dir": ""}, "output_dir is empty"),
        ({"data__path": ""}, "data.path is empty"),
        ({"remat": "some"}, "remat 'some' is unknown"),
        ({"layers": "some"}, "layers 'some' is unknown"),
        ({"accumulate": 3}, "batch_size 2 does not divide into 3 micro-batches"),
        ({"lora__modules": ("q",)}, "lora.modules: 'q' is not one of"),
        ({"held_out": 40}, "cannot hold out 40 of 40 rows"),
        ({"optimizer__schedule": "steep"}, "schedule 'steep' is unknown"),
        ({"mesh__tensor": 8}, "base: query heads .4. does not divide"),
    ],
)
def test_what_is_refused(base, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        sft.main(config_of(base, tmp_path, **fields))


def test_another_config_in_the_same_directory(base, lora_run):
    with pytest.raises(InputError, match="holds a run of another config"):
        sft.main(config_of(base, lora_run, lora__rank=3))
