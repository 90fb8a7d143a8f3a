"""A job that goes on does so with the models, templates and prompts that it began with."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from decode import generate, job
from proxy_jax import trio
from proxy_jax.errors import InputError
from proxy_jax.trio import ModelSpec, identify, open_trio
from tests.decode import jobs
from tests.trios import PROMPTS, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    make_model("llama", 320, 0, num_hidden_layers=1).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def config_of(directory: Path, model: Path, **fields):
    config = jobs.decoding()
    config.base.path, config.base.dtype = str(model), "float32"
    config.prompts.path = str(directory / "prompts.jsonl")
    config.output_dir = str(directory / "out")
    config.batch_size, config.max_new_tokens = 2, 2
    for name, value in fields.items():
        config[name] = value
    return config


def inputs(config):
    """What identifies the job, as generate has it."""
    rows = job.read_prompts(config)
    trio = open_trio(job.model_specs(config))
    requests, _ = job.job_requests(trio, job.options(config), rows)
    return job.inputs(trio, rows, requests)


def changed_names(before, after):
    return {name for name in before if before[name] != after[name]}


def test_a_weight_that_is_replaced(model, tmp_path):
    own = shutil.copytree(model, tmp_path / "m")
    jobs.write_prompts(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS[:3]])
    config = config_of(tmp_path, own)
    generate.main(config)
    outputs = tmp_path / "out" / "outputs.jsonl"
    whole = outputs.read_text()
    outputs.write_text("".join(whole.splitlines(True)[:1]))  # as a kill leaves it
    shutil.move(own, tmp_path / "moved")
    config.base.path = str(tmp_path / "moved")
    generate.main(config)  # the same model elsewhere
    assert outputs.read_text() == whole

    outputs.write_text("".join(whole.splitlines(True)[:1]))
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"made by another job \(base.model: '?\w{12}\.\.\., now"):
        generate.main(config)
    assert outputs.read_text() == "".join(whole.splitlines(True)[:1])


def test_what_a_job_depends_on(model, tmp_path):
    own = shutil.copytree(model, tmp_path / "m")
    prompts = tmp_path / "prompts.jsonl"
    jobs.write_prompts(prompts, [{"prompt": p} for p in PROMPTS[:3]])
    config = config_of(tmp_path, own)
    before = inputs(config)
    assert inputs(config) == before

    jobs.write_prompts(prompts, [{"prompt": p} for p in (PROMPTS[0], PROMPTS[2], PROMPTS[1])])
    assert changed_names(before, inputs(config)) == {"prompts"}
    jobs.write_prompts(prompts, [{"prompt": p} for p in PROMPTS[:3]])
    assert inputs(config) == before

    generation = own / "generation_config.json"
    content = json.loads(generation.read_text())
    generation.write_text(json.dumps(content | {"eos_token_id": [2, 3]}))
    assert changed_names(before, inputs(config)) == {"base", "ends"}


def test_a_template_that_prints_the_time(model, tmp_path):
    """As others print the date."""
    own = shutil.copytree(model, tmp_path / "m")
    (own / "chat_template.jinja").write_text(
        "{{ strftime_now('%f') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    jobs.write_prompts(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS[:3]])
    config = config_of(tmp_path, own)
    config.base.template = "chat"
    assert changed_names(inputs(config), inputs(config)) == {"prompts"}


def test_prompts_that_cannot_be_read_again(model, tmp_path):
    os.mkfifo(tmp_path / "prompts.jsonl")
    with pytest.raises(InputError, match=r"prompts.jsonl: not a regular file"):
        generate.main(config_of(tmp_path, model))


def test_runs_and_adapters(model, tmp_path):
    spec = ModelSpec(str(model), "float32")
    (plain,) = identify({"base": spec}).values()
    assert plain["adapter"] == ""
    assert plain["checkpoint"] is None
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text(name)
    (first,) = identify({"base": dataclasses.replace(spec, adapter=str(adapter))}).values()
    assert first["model"] == plain["model"]
    (adapter / "adapter_model.safetensors").write_text("trained further")
    (second,) = identify({"base": dataclasses.replace(spec, adapter=str(adapter))}).values()
    assert {k for k in first if first[k] != second[k]} == {"adapter"}

    run = tmp_path / "run"
    manifest = {"config": {"base": str(model), "lora": {"rank": 2, "alpha": 4.0}}}
    for step in (2, 4):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
        (run / "checkpoints" / str(step) / "data").write_text("x")
    (run / "manifest.json").write_text(json.dumps(manifest))
    (last,) = identify({"base": ModelSpec(str(run))}).values()
    assert (last["model"], last["checkpoint"]) == (plain["model"], 4)
    (run / "checkpoints" / "6").mkdir()
    (run / "checkpoints" / "6" / "data").write_text("x")
    (gone_on,) = identify({"base": ModelSpec(str(run))}).values()
    assert gone_on["checkpoint"] == 6
    with pytest.raises(InputError, match="absent"):
        identify({"base": ModelSpec(str(tmp_path / "absent"))})


def test_a_model_beside_its_adapter_is_read_once(model, monkeypatch):
    """Three roles of one file: its fingerprint is taken once."""
    taken = []

    def fingerprint(path):
        taken.append(path)
        return str(path)

    monkeypatch.setattr(trio, "fingerprint", fingerprint)
    identify({role: ModelSpec(str(model)) for role in ("base", "expert", "antiexpert")})
    assert taken == [model]
