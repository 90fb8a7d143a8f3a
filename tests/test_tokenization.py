"""How vocabularies are compared, and what each template feeds a model."""

import dataclasses
import json

import numpy as np
import pytest

from proxy_jax.errors import InputError
from proxy_jax.tokenization import Prompt, Template, align, encode
from proxy_jax.trio import ModelSpec, open_trio
from tests.trios import BOS, EOS, PAD, make_eos_tokenizer, make_model, make_tokenizer, write_trio


def test_report_of_equal_tokenizers():
    vocabulary = align(
        {"base": make_tokenizer(), "expert": make_tokenizer()}, {"base": 320, "expert": 304}
    )
    assert (vocabulary.size, vocabulary.tokens) == (320, 300)
    np.testing.assert_array_equal(vocabulary.shared, np.arange(320) < 300)
    np.testing.assert_array_equal(vocabulary.valid, np.arange(320) < 300)
    assert vocabulary.moved == {"expert": ()}
    assert vocabulary.absent == {"expert": 0}
    assert vocabulary.padding == {"base": 20, "expert": 4}


def test_report_of_moved_absent_and_extra_tokens():
    tokenizers = {
        "base": make_tokenizer(),
        "expert": make_tokenizer(swap=4, extra=["<new>", "<newer>"]),
        "antiexpert": make_tokenizer(drop=7),
    }
    vocabulary = align(tokenizers, {"base": 300, "expert": 302, "antiexpert": 310})
    assert vocabulary.moved == {"expert": (296, 297, 298, 299), "antiexpert": ()}
    assert vocabulary.absent == {"expert": 0, "antiexpert": 7}
    assert vocabulary.padding == {"base": 0, "expert": 0, "antiexpert": 17}
    np.testing.assert_array_equal(vocabulary.shared, np.arange(300) < 293)
    assert vocabulary.valid.all()


def test_ids_that_no_token_has_are_neither_valid_nor_shared():
    """Some tokenizers leave ids out."""
    tokenizer = make_tokenizer()
    words = tokenizer.get_vocab()
    holes = {31, 32, 270}

    class Sparse:
        def get_vocab(self):
            return {word: i for word, i in words.items() if i not in holes}

    vocabulary = align({"base": Sparse(), "expert": Sparse()}, {"base": 304, "expert": 304})
    without = [i for i in range(300) if i not in holes]
    np.testing.assert_array_equal(np.flatnonzero(vocabulary.valid), without)
    np.testing.assert_array_equal(np.flatnonzero(vocabulary.shared), without)


def test_another_tokenizer_is_refused():
    tokenizers = {"base": make_tokenizer(), "expert": make_tokenizer(swap=40)}
    with pytest.raises(InputError) as error:
        align(tokenizers, {"base": 300, "expert": 300})
    first, moved = (tokenizer.convert_ids_to_tokens(260) for tokenizer in tokenizers.values())
    assert first != moved
    assert str(error.value) == (
        f"expert: only 260 of the 300 ids of base's tokenizer mean the same in its own "
        f"(260: {first!r} / {moved!r}, "
        + ", ".join(
            f"{i}: {tokenizers['base'].convert_ids_to_tokens(i)!r} / "
            f"{tokenizers['expert'].convert_ids_to_tokens(i)!r}"
            for i in (261, 262)
        )
        + "); the models of a trio must share a vocabulary"
    )
    with pytest.raises(InputError, match="the rest is absent"):
        align(
            {"base": make_tokenizer(), "expert": make_tokenizer(drop=40)},
            {"base": 300, "expert": 300},
        )


def test_an_id_far_from_the_others():
    """What is made is of the size of the model, not of the id."""
    ids = make_tokenizer().get_vocab() | {"<far>": 3 * 10**8}

    class Far:
        def get_vocab(self):
            return ids

    vocabulary = align({"base": make_tokenizer(), "expert": Far()}, {"base": 304, "expert": 302})
    np.testing.assert_array_equal(vocabulary.shared, np.arange(304) < 300)
    assert vocabulary.padding == {"base": 4, "expert": 0}


def test_a_base_without_tokens():
    class Empty:
        def get_vocab(self):
            return {}

    with pytest.raises(InputError, match="base: its tokenizer has no token"):
        align({"base": Empty(), "expert": make_tokenizer()}, {"base": 300, "expert": 300})


def test_tokenizer_larger_than_its_model():
    """An id that a model has no row for can be read by nobody, so it is never generated."""
    found = align(
        {"base": make_tokenizer(), "expert": make_tokenizer()}, {"base": 296, "expert": 290}
    )
    assert found.valid.tolist() == [True] * 290 + [False] * 6
    assert found.padding == {"base": 0, "expert": 0}
    assert found.tokens == 296


QUESTION = "Question: how many apples are left?\n"


@pytest.mark.parametrize(
    ("spec", "prompt", "text"),
    [
        ("raw", Prompt(QUESTION, "Be kind.", "Answer:"), QUESTION + "Answer:"),
        ("raw", Prompt("one {two}"), "one {two}"),
        ("[INST] {prompt} [/INST]", Prompt("one {two}"), "[INST] one {two} [/INST]"),
        ("[INST] {prompt} [/INST]", Prompt("one", "", " A:"), "[INST] one [/INST] A:"),
        (
            "S: {system} U: {prompt} A: {response_prefix}",
            Prompt("one", "two", "three"),
            "S: two U: one A: three",
        ),
        ("reference", Prompt("one two"), "[INST] one two [/INST]"),
        (
            "reference",
            Prompt(QUESTION, response_prefix="Answer:"),
            "[INST] Question: how many apples are left? [/INST] Answer:",
        ),
        # The system prompt follows [INST] without a space, and a space comes before the question.
        (
            "reference",
            Prompt("one two\n\n", "Be kind.", "Answer:"),
            "[INST]<<SYS>>\nBe kind.\n<</SYS>>\n\n one two [/INST] Answer:",
        ),
        (
            "reference",
            Prompt("one two", "Be kind."),
            "[INST]<<SYS>>\nBe kind.\n<</SYS>>\n\n one two [/INST]",
        ),
        # Every occurrence of the response prefix goes, those inside the prompt too.
        (
            "reference",
            Prompt("one Answer: two\n", response_prefix="Answer:"),
            "[INST] one  two [/INST] Answer:",
        ),
        # A system prompt with a backslash and an n keeps the two characters.
        ("reference", Prompt("x", "a\\nb"), "[INST]<<SYS>>\na\\nb\n<</SYS>>\n\n x [/INST]"),
    ],
)
def test_templates(spec, prompt, text):
    tokenizer = make_tokenizer(bos=True)
    ids = Template(spec).encode(prompt, tokenizer, make_tokenizer(chat=False), "expert")
    assert ids == [BOS, *make_tokenizer()(text)["input_ids"]]


def test_chat_template_of_the_roles_own_tokenizer():
    own = make_tokenizer(bos=True)
    ids = Template("chat").encode(
        Prompt("one", "Be kind.", "Answer:"), make_tokenizer(bos=True, chat=False), own, "expert"
    )
    text = "<|system|>Be kind.</s><|user|>one</s><|assistant|> Answer:"
    assert ids == make_tokenizer()(text)["input_ids"]  # no BOS but the template's own
    assert ids[0] == own.convert_tokens_to_ids("<|system|>")
    with pytest.raises(InputError, match="expert: template is 'chat', but its tokenizer has no"):
        Template("chat").encode(Prompt("one"), own, make_tokenizer(chat=False), "expert")


@pytest.mark.parametrize(
    ("ending", "prompt", "read"),
    [
        ("[/INST]", Prompt("one\n", "", "Answer:"), "one[/INST] Answer:"),
        ("[/INST]", Prompt("one", "", " Answer:"), "one[/INST] Answer:"),
        ("assistant\n", Prompt("one\n\n", "", "Answer:"), "oneassistant\nAnswer:"),
        ("assistant\n", Prompt("one", "", " Answer:"), "oneassistant\nAnswer:"),
        # Without a prefix nothing is changed.
        ("[/INST]", Prompt("one\n"), "one\n[/INST]"),
    ],
)
def test_response_prefix_after_a_chat_template(ending, prompt, read):
    """It is parted from the template's end by white space, its own or one space."""
    own = make_tokenizer()
    own.chat_template = f"{{{{ messages[0]['content'] + {ending!r} }}}}"
    ids = Template("chat").encode(prompt, make_tokenizer(), own, "expert")
    assert make_tokenizer().decode(ids) == read


def test_double_bos():
    template = Template("<s>[INST] {prompt} [/INST]")
    with pytest.raises(InputError, match="expert: its template starts with '<s>'"):
        template.encode(Prompt("one"), make_tokenizer(bos=True), make_tokenizer(), "expert")
    ids = template.encode(Prompt("one"), make_tokenizer(), make_tokenizer(), "expert")
    assert ids.count(BOS) == 1


@pytest.mark.parametrize("text", ["one", "one two</s>", "</s>", "one</s></s>", "", "é ü"])
def test_nothing_is_put_behind_a_text(text):
    both, bos = make_eos_tokenizer(), make_tokenizer(bos=True)
    assert encode(both, text) == bos(text)["input_ids"]
    assert encode(both, text, special=False) == make_tokenizer()(text)["input_ids"]
    both.add_bos_token, both.add_eos_token = False, True  # as a setting of the tokenizer
    assert encode(both, text) == make_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("spec", ["raw", "[INST] {prompt} [/INST]", "reference", "chat"])
def test_no_prompt_ends_with_an_eos_of_the_tokenizers(spec):
    both, bos = make_eos_tokenizer(), make_tokenizer(bos=True)
    prompt = Prompt(QUESTION, "" if spec == "chat" else "Be kind.", "Answer:")
    ids = Template(spec).encode(prompt, both, both, "expert")
    assert ids == Template(spec).encode(prompt, bos, bos, "expert")
    assert ids[-1] != EOS
    assert ids.count(BOS) == (spec != "chat")


@pytest.mark.parametrize("part", ["text", "system", "response_prefix"])
@pytest.mark.parametrize("spec", ["{prompt}{system}", "reference", "chat"])
def test_half_of_a_surrogate_pair(spec, part):
    prompt = Prompt(**{"text": "one", part: "\ud83d"})
    with pytest.raises(InputError, match=r"ud83d.* cannot be tokenised"):
        Template(spec).encode(prompt, make_tokenizer(), make_tokenizer(), "expert")


def test_a_chat_template_that_fails_names_the_role():
    own = make_tokenizer()
    own.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(InputError, match=r"^expert: the chat template fails \(no system role here"):
        Template("chat").encode(Prompt("one", "Be kind."), make_tokenizer(), own, "expert")


@pytest.mark.parametrize(
    "spec",
    [
        *("Raw", "{question}", "{prompt} {role}", "{prompt", "{prompt} {}", "{prompt:d}"),
        *("{0}", "{prompt.__class__}", "{prompt[0]}", "{prompt}{system.x}", "{prompt!x}"),
        *("{prompt:>1000000000}", "{prompt:.1000000}", "{prompt:{system}}", "{prompt}\udcff"),
    ],
)
def test_malformed_templates(spec):
    with pytest.raises(InputError, match="template"):
        Template(spec)


def test_a_layout_within_reason():
    assert Template("{prompt:.3}|{system:>5}").render(Prompt("abcdef", "x"), None) == "abc|    x"


def without_weights(directory):
    """What is refused before the weights are read needs none."""
    for file in directory.rglob("*.safetensors"):
        file.unlink()


def test_different_soft_caps_are_refused_before_weights_are_read(tmp_path):
    small = {"num_hidden_layers": 1, "head_dim": 8}
    trio = write_trio(
        tmp_path,
        {
            "base": make_model("gemma2", 320, 0, final_logit_softcapping=30.0, **small),
            "expert": make_model("gemma2", 320, 1, final_logit_softcapping=None, **small),
        },
    )
    without_weights(tmp_path)
    with pytest.raises(InputError, match=r"soft-caps differ \(base 30.0, expert None\)"):
        open_trio({role: trio.spec(role) for role in trio.paths})


def test_another_tokenizer_is_refused_before_weights_are_read(tmp_path):
    models = {"base": make_model("llama", 320, 0), "expert": make_model("llama", 320, 1)}
    trio = write_trio(tmp_path, models, {"expert": make_tokenizer(swap=60)})
    without_weights(tmp_path)
    with pytest.raises(InputError, match="must share a vocabulary"):
        open_trio({role: trio.spec(role) for role in trio.paths})


def test_dtype_and_missing_base(tmp_path):
    with pytest.raises(InputError, match="base: dtype 'int8' is unknown"):
        open_trio({"base": ModelSpec(str(tmp_path), "int8")})
    with pytest.raises(InputError, match="needs a base"):
        open_trio({"expert": ModelSpec(str(tmp_path))})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and an expert with one more token, for which the base has a row."""
    models = {"base": make_model("llama", 320, 0), "expert": make_model("llama", 301, 1)}
    extra = {"expert": make_tokenizer(extra=["<end>"])}
    trio = write_trio(tmp_path_factory.mktemp("pair"), models, extra)
    without_weights(trio.paths["base"].parent)
    return trio


def ends(pair, role, tmp_path, **files):
    """What ends a text, with eos_token_id in files of a role."""
    path = tmp_path / role
    path.mkdir()
    for file in pair.paths[role].iterdir():
        content = file.read_text()
        if file.stem in files:
            content = json.dumps(json.loads(content) | {"eos_token_id": files[file.stem]})
        (path / file.name).write_text(content)
    specs = {name: pair.spec(name) for name in pair.paths}
    return open_trio(specs | {role: dataclasses.replace(specs[role], path=str(path))}).eos_ids()


def test_what_ends_a_text(pair, tmp_path):
    """The ids of both files and the tokenizer, of every role; but none that no text can have."""
    assert ends(pair, "base", tmp_path, config=5, generation_config=[6, PAD]) == (PAD, EOS, 5, 6)
    again = tmp_path / "again"
    again.mkdir()
    # 300 is <end> for the expert, and a row that no token uses for the base.
    assert ends(pair, "expert", again, config=300, generation_config=[7]) == (EOS, 7)


@pytest.mark.parametrize(("role", "ids"), [("base", 320), ("expert", [2, 301]), ("base", 10**12)])
def test_an_end_that_is_no_id(pair, role, ids, tmp_path):
    last = ids[-1] if isinstance(ids, list) else ids
    with pytest.raises(InputError, match=f"/{role}: eos_token_id {last} is out of range"):
        ends(pair, role, tmp_path, generation_config=ids)
