"""Plan shared: an expert that is the anti-expert with an adapter, or only another prompt."""

import dataclasses

import jax
import numpy as np
import peft
import pytest
import torch

from decode import engine
from proxy_jax.cpu import products
from proxy_jax.errors import InputError
from proxy_jax.models.lora import is_adapted
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import load_trio
from tests.trios import PROMPTS, STEPS, complete

MODULES = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(trio, directory, **fields):
    """A trio with M+ = M- and a random adapter: what its torch loop draws, and M+ in torch."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=MODULES, **fields)
    fresh = type(trio.models["antiexpert"]).from_pretrained(trio.paths["antiexpert"])
    torch.manual_seed(1)
    expert = peft.get_peft_model(fresh, config).eval()
    with torch.no_grad():
        for name, weight in expert.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.5)
    expert.save_pretrained(directory)
    tuned = dataclasses.replace(trio, models={**trio.models, "expert": expert})
    answers = [tuned.greedy(tuned.ids(prompt), STEPS) for prompt in PROMPTS]
    return answers, expert


@pytest.fixture(scope="module")
def lora(llama, tmp_path_factory):
    """The llama trio with an adapter as M+."""
    directory = tmp_path_factory.mktemp("adapter")
    answers, expert = adapted(llama, directory)
    return str(directory), answers, expert


def specs(llama, adapter):
    small = llama.spec("antiexpert")
    expert = dataclasses.replace(small, template=llama.templates["expert"], adapter=adapter)
    return {"base": llama.spec("base"), "expert": expert, "antiexpert": small}


@pytest.mark.parametrize("stacked_layers", [False, True])
@pytest.mark.parametrize("plan", ["separate", "shared"])
def test_an_adapter(llama, lora, plan, stacked_layers):
    adapter, answers, _ = lora
    loaded = load_trio(**specs(llama, adapter), plan=plan, stacked_layers=stacked_layers)
    assert complete(loaded) == answers


@pytest.fixture(scope="module")
def uneven(llama, tmp_path_factory):
    """A trio whose M- has two layers, and what it draws with an adapter that differs by layer."""
    swapped = {"base": "antiexpert", "antiexpert": "base"}
    models, paths, tokenizers = (
        dict(by_role) | {role: by_role[other] for role, other in swapped.items()}
        for by_role in (llama.models, llama.paths, llama.tokenizers)
    )
    trio = dataclasses.replace(llama, models=models, paths=paths, tokenizers=tokenizers)
    directory = tmp_path_factory.mktemp("uneven")
    fields = {
        "exclude_modules": r".*0\.mlp.*|.*1\.self_attn\.o_proj",
        "rank_pattern": {"1.mlp.up_proj": 3, "0.self_attn.q_proj": 1},
        "alpha_pattern": {"1.mlp.(up|down)_proj": 3},
    }
    answers, _ = adapted(trio, directory, **fields)
    untuned = dataclasses.replace(trio, models=models | {"expert": models["antiexpert"]})
    assert answers != [untuned.greedy(untuned.ids(prompt), STEPS) for prompt in PROMPTS]
    return trio, str(directory), answers


@pytest.mark.parametrize("stacked_layers", [False, True])
def test_an_adapter_that_differs_by_layer(uneven, stacked_layers):
    """Also where a layer's MLP has none at all."""
    trio, adapter, answers = uneven
    loaded = load_trio(**specs(trio, adapter), plan="shared", stacked_layers=stacked_layers)
    assert complete(loaded) == answers


def test_another_prompt_only(llama):
    separate, shared = (load_trio(**specs(llama, ""), plan=p) for p in ("separate", "shared"))
    assert complete(shared) == complete(separate)


def test_on_eight_devices(llama, lora):
    adapter, answers, _ = lora
    place = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert complete(load_trio(**specs(llama, adapter), plan="shared", place=place)) == answers


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_weights_are_there_and_read_once(llama, lora, monkeypatch):
    """The step's program has one product with each weight of the small model, of twice the rows."""
    monkeypatch.setattr(products, "available", lambda: False)  # a product is a dot_general
    loaded = load_trio(**specs(llama, lora[0]), plan="shared")
    leaves = jax.tree.leaves(loaded.params[1], is_leaf=is_adapted)
    weights = [leaf.weight if is_adapted(leaf) else leaf for leaf in leaves]
    rows = {leaf.shape for leaf in weights if leaf.shape[0] == 2}
    assert not rows, "no weight has an axis for the role"
    program = engine.Program.of(loaded)
    cache = jax.eval_shape(lambda: engine._empty_cache(program, program.passes[1], 4, 128))
    tokens = np.zeros((2, 4, 1), np.int32)
    run = lambda params, cache, tokens: engine._forward(  # noqa: E731
        program, program.passes[1], params, cache, tokens
    )
    jaxpr = jax.make_jaxpr(run)(loaded.params[1], cache, tokens)
    vocabulary = llama.models["antiexpert"].config.vocab_size
    heads = [
        eqn
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general" and vocabulary in eqn.invars[1].aval.shape
    ]
    assert [eqn.outvars[0].aval.size for eqn in heads] == [2 * 4 * vocabulary]


def test_what_is_refused(llama, lora):
    both = specs(llama, lora[0])
    with pytest.raises(InputError, match="plan 'stacked' has no place for an adapter"):
        load_trio(**both, plan="stacked")
    with pytest.raises(InputError, match="plan 'shared' needs an expert that is the anti-expert"):
        load_trio(**(both | {"expert": llama.spec("expert")}), plan="shared")
