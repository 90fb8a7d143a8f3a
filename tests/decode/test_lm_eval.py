"""lm-evaluation-harness on a trio, offline: equal to its own Hugging Face model, and to a loop."""

import copy
import functools
import json
import sys
from typing import Any

import pytest

from proxy_jax.errors import InputError
from tests import trios
from tests.decode.test_score import expected, shifted
from tests.trios import PROMPTS, TOKENS, make_model, make_tokenizer, write_trio

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from decode import lm_eval as adapter
from decode import memory
from decode.job import Job
from decode.score import Passage
from tests.decode import harness

LENGTH = 64  # of contexts and continuations, less than the models': contexts are cut
LONG = "the large model is not what the small model is; " * 8
DOCS = [
    {"question": "one two three", "choices": [" four", " apples and", " é"], "answer": 0},
    {"question": "The capital of France is: ", "choices": ["Paris", "two apples"], "answer": 1},
    {"question": LONG + "A", "choices": [" question", " model and models"], "answer": 1},
    {
        "question": "Q: how many apples are left?\nAnswer:",
        "choices": [" se\nven", " x"],
        "answer": 0,
    },
    {"question": "", "choices": ["apples", "The small model"], "answer": 0},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of task files over one file of documents."""
    return harness.write_tasks(tmp_path_factory.mktemp("tasks"), DOCS, ["e", "</s>"], 12)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        harness.stay_offline(patch, tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A model without padding rows, which transformers would let draw."""
    model = make_model("llama", TOKENS, 7, num_hidden_layers=1)
    return write_trio(tmp_path_factory.mktemp("single"), {"base": model})


def test_equal_to_transformers(single, tasks):
    path = str(single.paths["base"])
    common = {"dtype": "float32", "max_length": LENGTH}
    ours, results = harness.evaluate(
        "proxy_jax", tasks, model_args={"base": path, **common}, batch_size=4
    )
    theirs, _ = harness.evaluate(
        "hf", tasks, model_args={"pretrained": path, **common}, batch_size=2, device="cpu"
    )
    assert harness.largest_difference(ours, theirs) < 1e-3
    assert len({text for [text] in ours["generation"]}) > 2
    assert results["config"]["proxy_jax"]["base"]["path"] == path
    assert results["config"]["proxy_jax"]["batch_size"] == 4


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


def test_tokenizer_with_bos(tmp_path):
    """It is not doubled where a text has it, and stands before a text without a context."""
    model = make_model("llama", TOKENS, 8, num_hidden_layers=1)
    trio = write_trio(tmp_path, {"base": model}, {"base": make_tokenizer(bos=True)})
    path = str(trio.paths["base"])
    ours = adapter.ProxyLM(base=path, dtype="float32")
    theirs = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=4)
    for text in ("one two", "<s>one two", ""):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    pairs = [("", "one two"), ("", "<s>one two"), ("<s>A", " question"), ("A ", "question")]
    found = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    wanted = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], abs=1e-3)
    texts = instances("loglikelihood_rolling", [("one two",), ("",)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts), abs=1e-3
    )


def test_tokenizer_with_eos(trio_model):
    """A context does not end with the EOS that the tokenizer puts behind a text."""
    model, bos = copy.copy(trio_model), make_tokenizer(bos=True)
    model.tokenizer = trios.make_eos_tokenizer()
    assert model.tok_encode("one two") == bos("one two")["input_ids"]
    assert model.tok_encode("<s>one</s>") == bos("one</s>")["input_ids"]
    whole, context = (bos(text)["input_ids"] for text in ("one two", "one"))
    assert model._encode_pair("one", " two") == (context, whole[len(context) :])


@pytest.fixture(scope="module")
def trio_model(llama):
    roles: dict[str, Any] = {role: str(path) for role, path in llama.paths.items()}
    return adapter.ProxyLM(
        **roles,
        **{"expert.template": llama.templates["expert"]},
        dtype="float32",
        plan="stacked",
        alpha=0.5,
        response_prefix=" Answer:",
    )


def test_log_likelihoods_of_a_trio(llama, trio_model):
    """M+ reads the context through its template, and the response prefix after it."""
    pairs = [
        ("Question: how many apples are left? Answer:", " seven", True),
        ("one two three ", "four five six seven, and models and models", False),
    ]
    passages = []
    for context, continuation, prefixed in pairs:
        ids = llama.ids(context.rstrip())
        if prefixed:
            inside = llama.templates["expert"].format(prompt=context.removesuffix(" Answer:"))
            ids["expert"] = llama.tokenizers["base"](inside + " Answer:")["input_ids"]
        new = llama.ids(context + continuation)["base"][len(ids["base"]) :]
        passages.append(Passage(ids, new))
    requests = instances("loglikelihood", [pair[:2] for pair in pairs])
    found = trio_model.loglikelihood(requests, disable_tqdm=True)
    answers = expected(llama, passages, shifted(llama, [0.5]))
    for (log_prob, greedy), (log_probs, likeliest) in zip(found, answers, strict=True):
        assert log_prob == pytest.approx(log_probs.sum(), abs=1e-3)
        assert greedy == likeliest.all()


def test_texts_without_a_context(llama, trio_model):
    """Nobody's template wraps them."""
    ids = [trios.BOS, *llama.ids("one two three four")["base"]]
    [found] = trio_model.loglikelihood_rolling(
        instances("loglikelihood_rolling", [("one two three four",)]), disable_tqdm=True
    )
    passage = Passage(dict.fromkeys(llama.models, ids[:1]), ids[1:])
    [(log_probs, _)] = expected(llama, [passage], shifted(llama, [0.5]))
    assert found == pytest.approx(log_probs.sum(), abs=1e-3)


def test_generation_of_a_trio(llama, trio_model):
    """Every request has its own settings; a special token among the stop strings ends a text."""
    written = [llama.greedy(llama.ids(p), 12, llama.shifted(0.5)) for p in PROMPTS[:4]]
    tokenizer = llama.tokenizers["base"]
    plain = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    middle = plain[2][3]
    settings = [
        {"until": [], "max_gen_toks": 12},
        {"until": ["</s>"], "max_gen_toks": 5},
        {"until": [middle], "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 12},
    ]
    found = trio_model.generate_until(
        instances("generate_until", zip(PROMPTS, settings, strict=False)), disable_tqdm=True
    )
    short = tokenizer.decode(written[1][:5], skip_special_tokens=True)
    assert found == [plain[0], short, plain[2].split(middle)[0], plain[3]]


def test_sampling(trio_model):
    """Repeats of a request differ; a second run draws the same."""
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_gen_toks": 12}
    requests = instances("generate_until", [("one two", settings)] * 3)
    texts = trio_model.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) == 3
    assert trio_model.generate_until(requests, disable_tqdm=True) == texts


def test_special_tokens_end_a_text(trio_model):
    options, until = trio_model._generation({"until": ["<|user|>", "Q:"], "max_gen_toks": 3})
    assert options.eos_ids == (trios.EOS, trios.SPECIAL.index("<|user|>"))
    assert until == ["<|user|>", "Q:"]


def test_command_line(single, tasks, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from configs.defaults import decoding\n\n\ndef get_config():\n"
        f"    config = decoding()\n    config.base.path = {str(single.paths['base'])!r}\n"
        "    return config\n"
    )
    command = (
        f"lm_eval --model proxy_jax --model_args config={config},dtype=float32,max_length={LENGTH}"
        f" --tasks choice --include_path {tasks} --output_path {tmp_path / 'out'}"
    )
    only_ours = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", only_ours)  # reading all takes a minute
    monkeypatch.setattr(sys, "argv", command.split())
    adapter.main()
    [results] = (tmp_path / "out").rglob("results_*.json")
    content = json.loads(results.read_text())
    assert 0 <= content["results"]["choice"]["acc,none"] <= 1
    assert content["config"]["proxy_jax"]["base"]["dtype"] == "float32"
    monkeypatch.setattr(sys, "argv", command.replace("dtype=float32", "alhpa=1").split())
    with pytest.raises(SystemExit, match="2"):
        adapter.main()
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: model_args: alhpa=1: ")


def test_model_arguments(tmp_path):
    config = adapter.read_config(
        "", {"base": "m", "dtype": "float16", "mesh.tensor": 2, "alpha": 1, "stop": ["\n"]}
    )
    assert (config.base.path, config.antiexpert.dtype, config.mesh.tensor) == ("m", "float16", 2)
    assert config.alpha == 1.0
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("", {"alpha": "much"}, "model_args: alpha='much'"),
        ("", {"base.pth": "m"}, "model_args: base.pth='m'"),
        ("", {"": 1}, "model_args: =1"),
        (str(tmp_path / "none.py"), {}, "No such file"),
    ]
    for path, fields, message in refused:
        with pytest.raises(InputError, match=message):
            adapter.read_config(path, fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported, only 1, without effect"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 is not supported, only 1"),
        ({"typical_p": 0.9}, "typical_p=0.9 is not supported, only 1"),
        ({"beams": 1}, "beams=1 is not supported; settings are until, max_gen_toks"),
        ({"max_gen_toks": 512}, "max_gen_toks of 512 leaves no room for a context"),
        ({"max_gen_toks": "many"}, "generation_kwargs: cannot be understood"),
        ({"max_gen_toks": 0}, "generation_kwargs: options: max_new_tokens must be between 1 and"),
        ({"until": [5]}, "generation_kwargs: until must hold str values, not 5"),
        ({"do_sample": "yes"}, "generation_kwargs: do_sample must be true or false, not 'yes'"),
        ({"temperature": 1e39}, "generation_kwargs: sampling: temperature must be 0 or"),
        ({"temperature": 1.0, "top_k": -2}, "generation_kwargs: sampling: top_k must be"),
        ({"temperature": 1.0, "top_p": 0.0}, "generation_kwargs: sampling: top_p must be above 0"),
        ({"repetition_penalty": "a"}, "generation_kwargs: options: repetition_penalty must be a"),
    ],
)
def test_generation_that_is_refused(trio_model, settings, message, monkeypatch):
    """Before a request is worked on, though another's settings are right."""
    monkeypatch.setattr(adapter, "Generator", None)
    both = [("A", {"max_gen_toks": 3}), ("A", settings)]
    with pytest.raises(InputError, match=message):
        trio_model.generate_until(instances("generate_until", both), disable_tqdm=True)


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": -1}, {"top_p": 1.0}], ids=str)
def test_truncation_that_changes_nothing(trio_model, settings):
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    plain, _ = trio_model._generation(sampled)
    assert trio_model._generation(sampled | settings) == (plain, [])


def test_settings_without_effect(single):
    """transformers takes them; the texts are those without."""
    path = str(single.paths["base"])
    ours = adapter.ProxyLM(base=path, dtype="float32")
    theirs = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=2)
    common = {"until": ["e"], "max_gen_toks": 6, "do_sample": False}
    more = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0, "top_k": None}
    written = [
        model.generate_until(
            instances("generate_until", [("A", common | settings)]), disable_tqdm=True
        )
        for model, settings in ((ours, {}), (ours, more | {"use_cache": True}), (theirs, more))
    ]
    assert written[0] == written[1] == written[2]


def test_not_enough_memory(llama, trio_model, monkeypatch):
    """Before anything is loaded; and once it is known how long the contexts are."""
    monkeypatch.setattr(memory, "_available", lambda place: 100_000)
    with monkeypatch.context() as patch:
        patch.setattr(Job, "load", None)
        with pytest.raises(InputError, match=r"the job needs about .* GiB .* 0.0 GiB are there"):
            adapter.ProxyLM(base=str(llama.paths["base"]), dtype="float32")
    [request] = instances("generate_until", [("A" * 60, {"max_gen_toks": 400})])
    needed = memory.estimate(
        trio_model.trio, trio_model.loaded.passes, trio_model.loaded.place, 8,
        dict.fromkeys(trio_model.trio.roles, 400), 400,
    ).total  # fmt: skip
    monkeypatch.setattr(memory, "_available", lambda place: needed - 1)
    with pytest.raises(InputError, match="the job needs about"):
        trio_model.generate_until([request], disable_tqdm=True)


def test_arguments_of_the_wrong_type():
    for fields, message in (
        ({"batch_size": "many"}, "batch_size 'many': not a number"),
        ({"batch_size": 0}, "batch_size must be between 1 and"),
        ({"stop": 5}, "model_args: stop=5"),
    ):
        with pytest.raises(InputError, match=message):
            adapter.ProxyLM(base="m", **fields)


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + trios.CHAT_TEMPLATE
)


def test_a_chat_template_without_a_system_role(single, tmp_path):
    """As lm_eval's own models do, the conversation goes without it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    trio = write_trio(tmp_path, dict(single.models), {"base": tokenizer})
    path = str(trio.paths["base"])
    history = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    raw = adapter.ProxyLM(base=path, dtype="float32")
    theirs = HFLM(pretrained=path, dtype="float32", device="cpu")
    assert raw.apply_chat_template(history) == "<|user|>one</s><|assistant|>"
    assert raw.apply_chat_template(history) == theirs.apply_chat_template(history)
    raw.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match=r"base: the chat template fails \(never\)"):
        raw.apply_chat_template(history)
    raw.tokenizer.chat_template = None
    with pytest.raises(InputError, match="base: its tokenizer has no chat template"):
        raw.apply_chat_template(history)


def test_chat_templates(single, trio_model):
    history = [{"role": "user", "content": "one"}]
    with pytest.raises(InputError, match="expert has a template in the config"):
        trio_model.apply_chat_template(history)
    raw = adapter.ProxyLM(base=str(single.paths["base"]), dtype="float32")
    assert raw.apply_chat_template(history) == "<|user|>one</s><|assistant|>"
