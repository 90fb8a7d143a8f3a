"""The training program on a tiny model: what it leaves, and that interruptions change nothing."""

import contextlib
import datetime
import fcntl
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs.train.defaults import sft as defaults
from proxy_jax.errors import InputError
from proxy_jax.models import decoder
from proxy_jax.trio import ModelSpec, load_trio
from tests import trios
from tests.programs import environment
from train import sft

EIGHT = ("mesh__data", "mesh__fsdp", "mesh__tensor")
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


def config_of(start, directory, **fields):
    config = defaults()
    config.update(
        {
            "base": str(start),
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
    config.data.path = str(Path(start) / "rows.jsonl")
    config.optimizer.learning_rate = 3e-3
    for name, value in fields.items():
        part, _, field = name.partition("__")
        if field:
            config[part][field] = value
        else:
            config[part] = value
    return config


def command_of(config):
    script = (
        "import json, sys; from configs.train.defaults import sft as defaults;"
        "from train import sft;"
        "config = defaults(); config.update(json.loads(sys.argv[1])); sft.main(config)"
    )
    return [sys.executable, "-c", script, json.dumps(config.to_dict())]


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
    counts = json.loads((lora_run / "data.json").read_text())["train"]
    assert counts["kept"] == 32
    for name in ("tokens", "trained_tokens"):
        assert sum(records(lora_run, name).values()) == 3 * counts[name]
    assert all(0 < mfu < 1 for mfu in records(lora_run, "mfu").values())
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


def test_consistent_proxy_tuning(base, lora_run, tmp_path):
    """From the first step on the loss is that of M: M- + (M - M-)."""
    large = tmp_path / "large"
    trios.make_model("llama", 320, 7, num_hidden_layers=3).save_pretrained(large)
    trios.make_tokenizer().save_pretrained(large)
    fields = {"lora__rank": 2, "optimizer__warmup_ratio": 1.0, "consistent__base": str(large)}
    sft.main(config_of(base, tmp_path / "run", **fields, consistent__alpha_train=1.0))
    sft.main(config_of(large, tmp_path / "alone", data__path=str(base / "rows.jsonl"), epochs=1))
    ours, theirs = records(tmp_path / "run"), records(tmp_path / "alone")
    # Offsets are float16, and rows of the output that no token uses get none.
    assert ours[1] == pytest.approx(theirs[1], rel=3e-3)
    assert records(lora_run)[1] != pytest.approx(theirs[1], rel=1e-2)
    assert ours[max(ours)] < ours[1]


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


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_signals(base, lora_run, tmp_path, kind):
    """In another process. The loop of five kills takes too long for every run: tests/real."""
    config = config_of(base, tmp_path, lora__rank=2, lora__dropout=0.1)
    if kind == signal.SIGTERM:
        config.checkpoint_every = 1000  # only the signal makes one
    process = subprocess.Popen(
        command_of(config),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    metrics, checkpoints = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    begun = (
        (lambda: metrics.exists() and metrics.stat().st_size)
        if kind == signal.SIGTERM
        else (lambda: list(checkpoints.glob("[0-9]*")))
    )
    while process.poll() is None and not begun():
        time.sleep(0.01)
    assert begun()
    process.send_signal(kind)
    output, _ = process.communicate()
    assert not (tmp_path / "expert").exists()
    if kind == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert b"stopped by SIGTERM after step" in output
        assert list(checkpoints.glob("[0-9]*"))
    sft.main(config)
    name = Path("expert") / "adapter" / "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (lora_run / name).read_bytes()


def test_goes_on_on_another_mesh(base, lora_run, tmp_path, monkeypatch):
    fields = {"lora__rank": 2, "lora__dropout": 0.1}
    whole = sft.train_step

    def step(recipe, state, *rest):
        if int(state.step) == 7:
            raise KeyboardInterrupt
        return whole(recipe, state, *rest)

    monkeypatch.setattr(sft, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        sft.main(config_of(base, tmp_path, **fields))
    monkeypatch.setattr(sft, "train_step", whole)
    sft.main(config_of(base, tmp_path, **fields, mesh__data=2, mesh__tensor=2))
    assert records(tmp_path) == pytest.approx(records(lora_run), rel=1e-4)
    name = Path("expert") / "adapter" / "adapter_model.safetensors"
    ours, theirs = load_file(tmp_path / name), load_file(lora_run / name)
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], atol=1e-4, err_msg=key)


def start_two(config, directory, devices):
    """`python -m train.sft` as two processes of so many devices each."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    file = directory / "config.py"
    file.write_text(
        "from configs.train.defaults import sft\n\n\ndef get_config():\n    config = sft()\n"
        f"    config.update({config.to_dict()!r})\n    return config\n"
    )
    variables = environment(
        JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
        JAX_NUM_PROCESSES="2",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    return [
        subprocess.Popen(
            [sys.executable, "-m", "train.sft", f"--config={file}"],
            cwd=Path(__file__).parents[2],
            env={**variables, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def finish_two(processes):
    ends = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert ["merged weights" in output for output, _ in ends] == [True, False]


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """A run of two processes of four devices, and its config."""
    directory = tmp_path_factory.mktemp("two")
    fields = {"batch_size": 4, "eval_every": 0, "lora__rank": 2, "distributed": True}
    config = config_of(base, directory / "run", **fields, **dict.fromkeys(EIGHT, 2))
    finish_two(start_two(config, directory, 4))
    return config


def test_two_processes(base, two, tmp_path):
    """Two processes of four devices train as one process of eight."""
    config = two.copy_and_resolve_references()
    config.output_dir = str(tmp_path)
    sft.main(config)
    assert records(Path(two.output_dir)) == pytest.approx(records(tmp_path), rel=1e-5)


def test_two_processes_with_the_same_rows(base, two, tmp_path):
    """What a process reads follows from the mesh: here its one device holds all rows."""
    config = two.copy_and_resolve_references()
    config.output_dir = str(tmp_path / "run")
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 2})
    finish_two(start_two(config, tmp_path, 1))
    assert records(tmp_path / "run") == pytest.approx(records(Path(two.output_dir)), rel=1e-4)


def test_a_lost_process_ends_the_run_which_goes_on(two, tmp_path):
    config = two.copy_and_resolve_references()
    config.output_dir = str(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    processes = start_two(config, tmp_path, 4)
    while not (checkpoints / "3").exists():
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.01)
    processes[1].kill()
    _, errors = processes[0].communicate(timeout=600)
    processes[1].communicate()
    assert processes[0].returncode not in (0, 2), errors
    assert "Traceback" not in errors
    last = errors.strip().split("\n")[-1]
    assert last.startswith("error: another process of the job is gone"), errors
    assert not (checkpoints / "9").exists()
    assert not (tmp_path / "run" / "expert").exists()
    finish_two(start_two(config, tmp_path, 4))
    name = Path("expert") / "adapter" / "adapter_model.safetensors"
    whole, resumed = Path(two.output_dir) / name, tmp_path / "run" / name
    assert whole.read_bytes() == resumed.read_bytes()


def test_from_random_weights(base, tmp_path):
    architecture = json.loads((base / "config.json").read_text())
    config = config_of(base, tmp_path, base="", tokenizer=str(base), epochs=6)
    config.architecture = ConfigDict(architecture)
    sft.main(config)
    losses = list(records(tmp_path).values())
    assert losses[0] > 4
    assert losses[-1] < 0.5 * losses[0]
    # The run's checkpoint, read by the decoder, is the model that transformers reads.
    ids = jnp.arange(3, 20)[None]
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "expert")
        expected = model(torch.tensor(np.asarray(ids))).logits.numpy()
    loaded = load_trio(str(tmp_path))
    positions = jnp.arange(ids.shape[1])[None]
    found, _ = decoder.apply(loaded.passes[0].config, loaded.params[0], ids, positions)
    np.testing.assert_allclose(found, expected, atol=1e-4)


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
        ({"base": ""}, "base names the model to tune, .* neither is set"),
        ({"architecture": ConfigDict({"model_type": "llama"})}, "both are set"),
        (
            {"base": "", "architecture": ConfigDict({"model_type": "llama"})},
            "tokenizer is empty: which one goes with the architecture",
        ),
        ({"consistent__alpha_train": 1.0}, "alpha_train and consistent.base go together"),
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


@pytest.fixture
def ended(lora_run, tmp_path):
    """The run without its export: the same command goes on with it."""
    shutil.copytree(lora_run, tmp_path / "run", ignore=shutil.ignore_patterns("expert"))
    return tmp_path / "run"


def test_goes_on_beside_a_damaged_checkpoint(base, lora_run, ended, capsys):
    """And ends with the parameters of a run that was never damaged."""
    *_, last = sorted((ended / "checkpoints").iterdir(), key=lambda p: int(p.name))
    weights = max((p for p in last.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1000])
    sft.main(config_of(base, ended, lora__rank=2, lora__dropout=0.1))
    (line,) = [s for s in capsys.readouterr().out.split("\n") if s.startswith("going on from")]
    assert f"checkpoint {last} is damaged" in line
    assert last.with_name(f"{last.name}.damaged").exists()
    assert records(ended) == records(lora_run)
    name = Path("expert") / "adapter" / "adapter_model.safetensors"
    assert (ended / name).read_bytes() == (lora_run / name).read_bytes()


def test_another_export_dtype_exports_the_run_again(base, ended):
    sft.main(config_of(base, ended, lora__rank=2, lora__dropout=0.1, export_dtype="bfloat16"))
    settings = json.loads((ended / "expert" / "config.json").read_text())
    assert settings["torch_dtype"] == "bfloat16"


def test_a_run_that_another_process_goes_on_with(base, ended):
    with (ended / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"run: another process is training in it"):
            sft.main(config_of(base, ended, lora__rank=2, lora__dropout=0.1))


def test_a_run_is_held_until_it_is_closed(base, tmp_path):
    config = config_of(base, tmp_path)
    run = sft.open_run(config)
    with pytest.raises(InputError, match="another process is training in it"):
        sft.open_run(config)
    run.close()
    sft.open_run(config).close()


def test_chat_templates_print_the_day_on_which_a_run_began(base, tmp_path):
    config = config_of(base, tmp_path)
    sft.open_run(config).close()
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["runs"][0]["started"] = "2020-02-29T23:59:59Z"
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with contextlib.closing(sft.open_run(config)) as run:
        assert run.date == datetime.date(2020, 2, 29)


def test_a_manifest_that_is_lost_or_damaged(base, ended):
    config = config_of(base, ended, lora__rank=2, lora__dropout=0.1)
    manifest = ended / "manifest.json"
    content = json.loads(manifest.read_text())
    for damaged, message in (
        ("[]", "not a JSON object"),
        ('{"config": {}, "inputs": [], "runs": []}', "not a manifest of a job"),
        (json.dumps(content | {"runs": [{"started": 3}]}), "runs: no date of the first one"),
        (json.dumps(content | {"runs": [3]}), "runs: no date of the first one"),
        ("\0" * 100, "not JSON"),
    ):
        manifest.write_text(damaged)
        with pytest.raises(InputError, match=f"^{manifest}: {message}"):
            sft.open_run(config)
    manifest.unlink()
    with pytest.raises(InputError, match="has checkpoints, but no manifest"):
        sft.open_run(config)
