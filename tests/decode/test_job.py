"""What bad input gets: one line that names the line, the field, the role or the size."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from decode import check, generate, job, memory
from decode.scheduler import prefill_rows
from proxy_jax.errors import InputError
from proxy_jax.models import attention
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import open_trio
from tests.decode import jobs


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """A config whose models need not exist: prompts are read first."""
    return tmp_path_factory.mktemp("job")


def read(directory, text, **settings):
    path = directory / "bad.jsonl"
    path.write_text(text)
    config = jobs.decoding()
    config.prompts.path = str(path)
    for name, value in settings.items():
        part, _, last = name.rpartition("__")
        (config[part] if part else config)[last] = value
    return job.read_prompts(config)


GOOD = '{"prompt": "one"}\n'


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (GOOD + '{"prompt": "two"\n', {}, r"bad.jsonl:2: not JSON \(Expecting ',' delimiter"),
        (GOOD + "\n\n[1]\n", {}, "bad.jsonl:4: expected a JSON object, found list"),
        (GOOD + '{"text": "two", "id": 3}\n', {}, "2: no field 'prompt'; it has 'text', 'id'"),
        (GOOD * 2 + '{"prompt": ""}\n', {}, "bad.jsonl:3: prompt is empty"),
        (GOOD + '{"prompt": " \\n"}\n', {}, r"bad.jsonl:2: prompt is empty"),
        (GOOD + '{"prompt": 7}\n', {}, "bad.jsonl:2: prompt must be a string, not int"),
        (GOOD + '{"prompt": "\\ud800"}\n', {}, "bad.jsonl:2: not valid Unicode"),
        ("", {}, "bad.jsonl: no prompts"),
        ('{"q": ""}', {"prompts__template": " {q}"}, "bad.jsonl:1: the prompt is empty"),
        (GOOD, {"prompts__template": "{prompt} {extra}"}, "bad.jsonl:1: no field 'extra'"),
        (GOOD, {"prompts__template": "{prompt} {}"}, r"prompts.template '{prompt} {}'"),
        (GOOD, {"prompts__template": "{prompt.x}"}, r"prompts.template '{prompt.x}'"),
        (GOOD, {"prompts__template": "{prompt[a]}"}, r"prompts.template '{prompt\[a\]}'"),
        (GOOD, {"prompts__template": "{prompt"}, r"prompts.template '{prompt'"),
        (GOOD, {"prompts__id_field": "id"}, "bad.jsonl:1: no field 'id'"),
        (GOOD, {"alpha_field": "a"}, "bad.jsonl:1: no field 'a'"),
        ('{"prompt": "x", "a": "1"}', {"alpha_field": "a"}, "bad.jsonl:1: a must be a number"),
        (
            '{"prompt": "x", "a": NaN}',
            {"alpha_field": "a"},
            "bad.jsonl:1: a: coefficient must be finite",
        ),
        ('{"prompt": "x", "a": [[0, 1], [2.7, 0]]}', {"alpha_field": "a"}, "1: a: step must be an"),
        ('{"prompt": "x", "a": ["01"]}', {"alpha_field": "a"}, "bad.jsonl:1: a must be a number"),
        ('{"prompt": "x", "a": true}', {"alpha_field": "a"}, "bad.jsonl:1: a must be a number"),
        ('{"prompt": "x", "k": [NaN]}', {"prompts__id_field": "k"}, "1: k: no value that JSON has"),
        (GOOD, {"prompts__limit": -1}, "config: prompts: limit must be at least 0, not -1"),
        ('{"prompt": "x", "a": [[1, 1.0]]}', {"alpha_field": "a"}, "bad.jsonl:1: a: the steps"),
        ('{"prompt": "x", "a": []}', {"alpha_field": "a"}, "bad.jsonl:1: a: the steps"),
    ],
)
def test_prompt_files(fields, text, settings, message):
    with pytest.raises(InputError, match=message):
        read(fields, text, **settings)


def test_rows_that_are_read(fields):
    rows = read(fields, GOOD + "\n" + '{"prompt": "two", "a": 2}\n' + GOOD, prompts__limit=2)
    assert [(row.line, row.prompt.text) for row in rows] == [(1, "one"), (3, "two")]
    (row,) = read(fields, '{"q": "1+1", "k": "4", "a": null}', prompts__template="{q} = {{{k}}}",
                  prompts__id_field="k", alpha_field="a")  # fmt: skip
    assert (row.prompt.text, row.id, row.alpha) == ("1+1 = {4}", "4", None)


def test_files_that_cannot_be_read(fields):
    config = jobs.decoding()
    with pytest.raises(InputError, match=r"prompts.path is empty"):
        job.read_prompts(config)
    config.prompts.path = str(fields / "absent.jsonl")
    with pytest.raises(InputError, match=r"absent.jsonl: No such file"):
        job.read_prompts(config)
    config.prompts.path = str(fields / "latin.jsonl")
    Path(config.prompts.path).write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        job.read_prompts(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling__temperature": -1.0}, "sampling: temperature must be at least 0, not -1.0"),
        ({"sampling__top_p": 1.5}, "sampling: top_p must be between 0 and 1, not 1.5"),
        ({"base_filter__min_p": -0.1}, "base_filter: min_p must be between 0 and 1, not -0.1"),
        ({"sampling__top_k": -2}, "sampling: top_k must be between -1 and"),
        ({"batch_size": 0}, "batch_size must be between 1 and"),
        ({"chunk_steps": 0}, "chunk_steps must be between 1 and"),
        ({"samples": 0}, "samples must be between 1 and"),
        ({"min_new_tokens": -1}, "min_new_tokens must be between 0 and"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between"),
        ({"alpha": float("inf")}, "alpha: coefficient must be finite, not inf"),
        ({"alpha_schedule": ((0, 1.0), (0, 2.0))}, "alpha: the steps of a schedule rise"),
        ({"method": "both"}, "method 'both' is unknown"),
        ({"method": "expert", "expert__path": ""}, "method is 'expert', but expert.path is empty"),
        ({"base__path": ""}, "base.path is empty"),
        ({"base__path": "/nowhere/at/all"}, "/nowhere/at/all: no such file or directory"),
        ({"layers": "some"}, "layers 'some' is unknown"),
        ({"plan": "both"}, "plan 'both' is unknown"),
        ({"replicate": ("width",)}, "replicate: 'width' is not one of"),
        ({"mesh__data": 3}, r"batch_size \(4\) does not divide by the 3 devices"),
        ({"mesh__fsdp": 7}, r"base: model width \(48\) does not divide by the 7 devices"),
        ({"mesh__tensor": 16}, "mesh data=1 x fsdp=1 x tensor=16 does not fit the 8 cpu devices"),
        ({"expert__template": "{text}"}, "template '{text}' is not raw"),
        ({"max_new_tokens": 495}, r"line 2: \d\d tokens for expert and 495 new ones exceed"),
    ],
    ids=str,
)
@pytest.mark.parametrize("program", [generate, check], ids=["generate", "check"])
def test_configs(llama, tmp_path, program, settings, message, monkeypatch):
    monkeypatch.setattr(job, "load_trio", None)  # nothing is loaded first
    rows = [{"prompt": "A"}, {"prompt": "one two three four five"}]
    jobs.write_prompts(tmp_path / "prompts.jsonl", rows)
    config = jobs.config_of(llama, tmp_path, **settings)
    with pytest.raises(InputError, match=message) as error:
        program.main(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sampling", None, "config: sampling is missing"),
        ("sampling", 0.7, "config: sampling must be an object, not 0.7"),
        ("sampling__top_p", None, "config: sampling: top_p is missing"),
        ("base", None, "config: base is missing"),
        ("base__path", 5, "config: base: path must be a string, not 5"),
        ("expert__dtype", None, "config: expert: dtype is missing"),
        ("method", None, "config: method is missing"),
        ("plan", 3, "config: plan must be a string, not 3"),
        ("layers", ["auto"], "config: layers must be a string, not"),
        ("replicate", (3,), "config: replicate must hold str values, not 3"),
        ("replicate", "kv_heads", "config: replicate must be a list, not 'kv_heads'"),
        ("mesh", None, "config: mesh is missing"),
        ("mesh__data", "all", "config: mesh: data must be an integer, not 'all'"),
        ("mesh__pipeline", 2, "mesh axis 'pipeline' is unknown"),
        ("batch_size", "8", "batch_size must be an integer, not '8'"),
        ("banned_tokens", None, "config: banned_tokens is missing"),
        ("prompts__path", None, "config: prompts: path is missing"),
        ("prompts__field", None, "config: prompts: field is missing"),
        ("system_prompt", 1, "config: system_prompt must be a string, not 1"),
    ],
)
def test_configs_of_another_kind(tmp_path, name, value, message):
    """Of another program or another time: a field or a section is not there, or is another."""
    jobs.write_prompts(tmp_path / "prompts.jsonl")
    fields = jobs.decoding().to_dict()
    fields["base"]["path"] = "m"
    fields["prompts"]["path"] = str(tmp_path / "prompts.jsonl")
    *sections, last = name.split("__")
    part = fields[sections[0]] if sections else fields
    part[last] = value
    with pytest.raises(InputError, match=message) as error:
        read_all(ConfigDict(fields))
    assert "\n" not in str(error.value)
    if value is None:
        del part[last]
        with pytest.raises(InputError, match=message):
            read_all(ConfigDict(fields))


def read_all(config):
    for part in (job.model_specs, job.plan, job.options, job.placement, job.stacked_layers):
        part(config)
    job.read_prompts(config)


def test_prompt_longer_than_the_context_of_one_role(llama, tmp_path):
    """M+ reads 14 bytes more than the others."""
    rows = [{"prompt": "A"}, {"prompt": "1 " * 245}]
    jobs.write_prompts(tmp_path / "prompts.jsonl", rows)
    config = jobs.config_of(llama, tmp_path, max_new_tokens=20)
    count = {role: len(ids) for role, ids in llama.ids(rows[1]["prompt"]).items()}
    assert count["base"] + 20 <= 512 < count["expert"] + 20
    with pytest.raises(InputError) as error:
        generate.main(config)
    assert str(error.value) == (
        f"line 2: {count['expert']} tokens for expert and 20 new ones exceed its context of 512"
    )


def test_not_enough_memory(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_available", lambda place: 100_000)
    monkeypatch.setattr(job, "load_trio", None)
    with pytest.raises(InputError, match=r"the job needs about .* GiB .* 0.0 GiB are there"):
        generate.main(jobs.config_of(llama, tmp_path))
    with pytest.raises(InputError, match="the job needs about"):
        check.main(jobs.config_of(llama, tmp_path))


@pytest.mark.parametrize("plan", ["separate", "stacked"])
def test_memory_counts_weights_and_caches(llama, plan):
    """Against the torch models; a checkpoint in two roles is read once, if they run apart."""
    specs = {role: llama.spec(role) for role in ("base", "expert")}
    trio = open_trio(specs | {"antiexpert": specs["expert"]})
    contexts = {"base": 30, "expert": 50, "antiexpert": 30}
    place = Placement(make_mesh({"data": 2, "tensor": 2}))
    estimate = memory.estimate(trio, trio.passes(plan), place, 4, contexts, 12)
    sizes = {role: sum(p.numel() for p in llama.models[role].parameters()) for role in specs}
    again = 0 if plan == "separate" else estimate.weights["expert"]
    assert estimate.weights["antiexpert"] == again
    for role, size in sizes.items():
        assert 0.5 * 4 * size <= estimate.weights[role] <= 0.51 * 4 * size  # but the norms
    # Of half of the rows, one of two heads: keys and values of each layer, in 128 slots.
    for role, layers, head in (("base", 2, 12), ("expert", 1, 8), ("antiexpert", 1, 8)):
        assert estimate.caches[role] == 2 * layers * 2 * 128 * 1 * head * 4


def test_memory_counts_scores_where_they_are_held(llama, monkeypatch):
    trio = open_trio({role: llama.spec(role) for role in ("base", "expert", "antiexpert")})
    given = trio.passes("separate"), Placement(make_mesh({})), 4, dict.fromkeys(trio.roles, 300), 12
    rows = prefill_rows(512, 4, given[1])  # of the longest prompt's bucket
    for kernel, scores in ((None, 2 * rows * 4 * 512**2 * 4), ("splash", 0)):  # 4 heads
        monkeypatch.setattr(attention, "kernel", lambda *_, kernel=kernel: kernel)
        assert memory.estimate(trio, *given).prefill == scores


def test_the_mesh_of_a_job_is_the_one_it_has(llama, tmp_path):
    """What is left for an axis differs with the machine, and rows may with it."""
    config = jobs.config_of(llama, tmp_path, mesh__fsdp=-1, mesh__tensor=2)
    assert job.resolved(config)["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
