"""Log-likelihoods of texts equal those of a loop over the transformers models in float64."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import MinPLogitsWarper

from decode import Truncation, score
from decode.score import Passage, Scorer, make_passages
from proxy_jax.errors import InputError
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.tokenization import Prompt
from proxy_jax.trio import load_trio, open_trio
from tests import trios

ALPHAS = (0.0, 0.5, 1.0, -0.7)
# Contexts and continuations of 1 to 50 tokens, so that they fill a part of a piece and more than
# one; but the last, padded to one length, so that few programs are compiled.
PAIRS = (
    ("The small model is tuned, and the large model is not; the difference", " tells"),
    ("A", " model is tuned, and the large model is not; the difference tells what to say"),
    ("one two three four five six seven", " apples and models and the small model is not"),
    ("Question: how many apples are left?\nAnswer:", " seven and models and"),
    ("é ü ß", " Three models answer a question, and the large model, the difference"),
    ("apples and models and", " the capital of France is what the small model tells"),
    ("The capital of France is what the large model tells,", " and"),
    (
        "one two three four five six seven and one two three four five six seven",
        " apples are left; how many apples are left?\nAnswer: one two three four five",
    ),
)


def expected(trio, passages, combine, change=lambda s: s):
    """A list a passage: ([A, n] log-probabilities, [A, n] whether the token is the likeliest).

    combine: scores by role -> [A, V].
    """
    answers = []
    for passage in passages:
        scores: dict[str, np.ndarray] = {}
        for role, context in passage.contexts.items():
            with torch.inference_mode():
                read = torch.tensor([[*context, *passage.ids]])
                logits = trio.models[role](read).logits[0, len(context) - 1 : -1].numpy()
            fitted = np.zeros((len(passage.ids), len(trio.valid)))
            fitted[:, : logits.shape[1]] = logits[:, : fitted.shape[1]]
            scores[role] = fitted
        log_probs, greedy = [], []
        for place, token in enumerate(passage.ids):
            combined = combine({role: s[place] for role, s in scores.items()}, place)
            allowed = np.where(trio.valid, change(scores["base"][place]), -np.inf)
            combined = np.where(np.isfinite(allowed), combined, -np.inf)
            log_probs.append(combined[:, token] - np.logaddexp.reduce(combined, axis=-1))
            greedy.append(np.argmax(combined, axis=-1) == token)
        answers.append((np.stack(log_probs, -1), np.stack(greedy, -1)))
    return answers


def shifted(trio, alphas=ALPHAS):
    return lambda s, place: np.stack([trio.shifted(a)(s, place) for a in alphas])


def agree(scores, answers):
    for one, (log_probs, greedy) in zip(scores, answers, strict=True):
        np.testing.assert_allclose(one.log_probs, log_probs, atol=1e-4)
        np.testing.assert_array_equal(one.greedy, greedy)
        np.testing.assert_allclose(one.totals, log_probs.sum(-1), atol=1e-3)
        np.testing.assert_array_equal(one.all_greedy, greedy.all(-1))


@pytest.fixture(scope="module")
def passages(loaded):
    made = make_passages(loaded.trio, PAIRS)
    assert {len(one.contexts["base"]) for one in made} >= {1, 6, 21, 37, 44}
    assert {len(one.ids) for one in made} >= {1, 4, 17, 46, 47}
    return made


@pytest.fixture(scope="module")
def answers(llama, passages):
    return expected(llama, passages, shifted(llama))


@pytest.mark.parametrize(("plan", "stacked_layers"), [("separate", False), ("stacked", True)])
def test_plans(llama, answers, plan, stacked_layers):
    loaded = llama.load(plan=plan, stacked_layers=stacked_layers)
    agree(Scorer(loaded, ALPHAS).score(PAIRS), answers)


def test_a_tokenizer_that_ends_texts(llama):
    """Neither a context nor what is scored has the EOS that it puts behind a text."""
    opened = open_trio({role: llama.spec(role) for role in llama.paths})

    def passages(tokenizer):
        members = {
            role: dataclasses.replace(member, tokenizer=tokenizer)
            for role, member in opened.members.items()
        }
        return make_passages(dataclasses.replace(opened, members=members), PAIRS)

    found = passages(trios.make_eos_tokenizer())
    assert found == passages(trios.make_tokenizer(bos=True))
    for passage in found:
        assert trios.EOS not in (*passage.ids, *passage.contexts["base"])


def test_an_adapter(llama, tmp_path):
    """M+ is M- with LoRA and another prompt; their weights are read once."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    fresh = type(llama.models["antiexpert"]).from_pretrained(llama.paths["antiexpert"])
    tuned = peft.get_peft_model(fresh, config).eval()
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    tuned.save_pretrained(tmp_path)
    small = llama.spec("antiexpert")
    expert = dataclasses.replace(small, template=llama.templates["expert"], adapter=str(tmp_path))
    loaded = load_trio(llama.spec("base"), expert, small, plan="shared")
    trio = dataclasses.replace(llama, models={**llama.models, "expert": tuned})
    answers = expected(trio, make_passages(loaded.trio, PAIRS[:-1]), shifted(trio))
    agree(Scorer(loaded, ALPHAS).score(PAIRS[:-1]), answers)


def test_three_families_with_moved_ids(mixed):
    """Sliding window, biases, tied head; the vocabularies have different sizes."""
    loaded = mixed.load()
    answers = expected(mixed, make_passages(loaded.trio, PAIRS[:-1]), shifted(mixed))
    agree(Scorer(loaded, ALPHAS).score(PAIRS[:-1]), answers)


def test_eight_devices(llama, answers):
    place = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    loaded = llama.load(plan="stacked", place=place)
    agree(Scorer(loaded, ALPHAS).score(PAIRS[:-1]), answers[:-1])


def test_prompts_of_the_roles(llama, passages):
    """M+ has a template; ids after the prompt are the same for all."""
    for one, (prompt, continuation) in zip(passages, PAIRS, strict=True):
        assert one.contexts == llama.ids(prompt)
        assert [*one.contexts["base"], *one.ids] == llama.ids(prompt + continuation)["base"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_changes_nothing(loaded, answers, batch_size):
    """Nor does the size of a piece, which follows from it."""
    agree(Scorer(loaded, ALPHAS, batch_size=batch_size).score(PAIRS[:-1]), answers[:-1])


def test_accelerators_combine_whole_pieces(loaded, answers, monkeypatch):
    piece = score._piece
    monkeypatch.setattr(score, "_piece", lambda *sizes: (piece(*sizes)[0],) * 2)
    agree(Scorer(loaded, ALPHAS, batch_size=2).score(PAIRS[:-1]), answers[:-1])


def test_a_score_depends_on_nothing_else(loaded, passages):
    """Neither on other passages nor on other alphas."""
    together = dict(Scorer(loaded, ALPHAS).stream(passages))
    for index in (0, 1, 4):
        [(_, alone)] = Scorer(loaded, [ALPHAS[1]]).stream([passages[index]])
        np.testing.assert_array_equal(alone.log_probs[0], together[index].log_probs[1])


def test_the_base_alone(llama, loaded, passages):
    """alpha = 0 is M bit for bit, and so is M loaded alone."""
    zero = Scorer(loaded, [0.0]).score(PAIRS[:-1])
    alone = Scorer(llama.load(("base",)), [1.0]).score(PAIRS[:-1])
    for one, other in zip(zero, alone, strict=True):
        np.testing.assert_array_equal(one.log_probs, other.log_probs)
    bases = [Passage({"base": one.contexts["base"]}, one.ids) for one in passages[:-1]]
    agree(alone, expected(llama, bases, lambda s, _: s["base"][None]))


def test_schedule_scale_form_and_filter(llama, loaded, passages):
    schedule = ((0, 0.3), (2, 1.5))

    def scaled(s, place):
        minus = s["antiexpert"]
        alpha = 0.3 if place < 2 else 1.5
        shift = minus + alpha * (s["expert"] - minus) + 1.6 * (s["base"] - minus)
        return np.where(llama.shared, shift, s["base"])[None]

    def filtered(base):
        return trios.warp(MinPLogitsWarper(0.01), np.where(llama.valid, base, -np.inf))

    answers = expected(llama, passages[:-1], scaled, filtered)
    assert not all(np.isfinite(log_probs).all() for log_probs, _ in answers)
    scorer = Scorer(loaded, [schedule], beta=1.6, base_filter=Truncation(min_p=0.01))
    agree(scorer.score(PAIRS[:-1]), answers)


def test_greedy_decoding_writes_what_is_all_greedy(llama, loaded):
    contexts = [llama.ids(prompt) for prompt, _ in PAIRS[:2]]
    written = [Passage(ids, llama.greedy(ids, 6, eos=())) for ids in contexts]
    other = [Passage(one.contexts, [*one.ids[:-1], (one.ids[-1] + 1) % 300]) for one in written]
    found = dict(Scorer(loaded).stream([*written, *other]))
    assert [bool(found[i].all_greedy[0]) for i in range(4)] == [True, True, False, False]
    assert [int(found[i].greedy.sum()) for i in range(4)] == [6, 6, 5, 5]


def test_blanks_before_the_continuation(loaded):
    pairs = [("A question: ", "apples"), ("A question:", " apples")]
    one, other = make_passages(loaded.trio, pairs)
    assert one == other
    prompt = Prompt("How many?", response_prefix=" Answer:")
    [prefixed] = make_passages(loaded.trio, [(prompt, " seven")])
    encoded = loaded.trio.encode(prompt)
    assert prefixed.contexts == encoded
    whole = loaded.trio.tokenizer("How many? Answer: seven")["input_ids"]
    assert [*encoded["base"], *prefixed.ids] == whole


def test_what_is_refused(loaded, passages):
    ids = passages[0].contexts
    with pytest.raises(InputError, match="alphas is empty"):
        Scorer(loaded, [])
    refused: list[tuple[dict[str, Any], str]] = [
        ({"alphas": [float("nan")]}, "alpha: coefficient must be finite"),
        ({"beta": 1e39}, "beta must be between"),
        ({"base_filter": Truncation(top_p=0.0)}, "base_filter: top_p must be above 0"),
        ({"batch_size": 0}, "batch_size must be between 1 and"),
        ({"batch_size": True}, "batch_size must be an integer, not True"),
    ]
    for values, message in refused:
        with pytest.raises(InputError, match=message):
            Scorer(loaded, **values)
    with pytest.raises(InputError, match="passage 1: empty prompt"):
        Scorer(loaded).score([("a", "b"), (" ", "c")])
    for passage, message in [
        (Passage(ids, []), "passage 1: nothing to score"),
        (Passage({**ids, "expert": []}, [5]), "passage 1: no context for expert"),
        (Passage(ids, [-1]), "passage 1: -1 is no id"),
        (Passage(ids, [320]), "passage 1: id 320 is beyond the 320 rows of base"),
        (Passage(ids, [5] * 512), "passage 1: .* exceed its context of 512"),
    ]:
        with pytest.raises(InputError, match=message):
            dict(Scorer(loaded).stream([passages[0], passage]))


def test_numbers_that_break(loaded, passages):
    """A state of M- is NaN at a token that only passage 4 reads; then a norm's weight is."""
    read = [{*one.contexts["antiexpert"], *one.ids[:-1]} for one in passages]
    only = min(read[4].difference(*read[:4], *read[5:]))
    *others, anti = loaded.params
    for name, where, message in [
        ("embedding", only, "passage 4: the antiexpert model became NaN or infinite"),
        ("final_norm", 0, "the combined logits became NaN or infinite"),
    ]:
        bad = {**anti, name: anti[name].at[where].set(jnp.nan)}
        with pytest.raises(InputError, match=message):
            dict(Scorer(dataclasses.replace(loaded, params=(*others, bad))).stream(passages))
