"""Tokenizers on disk: their ids are what tokenizer.json says, whatever class is named beside it."""

import json
import os
import shutil

import huggingface_hub
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from proxy_jax.checkpoints.safetensors import SafetensorsCheckpoint
from proxy_jax.errors import InputError
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.tokenization import open_tokenizer
from tests.trios import CHAT_TEMPLATE, make_tokenizer
from train.export import write_model

TEXTS = [
    *(
        f"{a} + {b} = {a + b}; I'LL pay ${a}{b}, it's {b}.\n\n"
        for a in range(9, 99)
        for b in (7, 83)
    ),
    "  def f(x):\n    return x  # what's left\t\n",
]
TEXT = "In 2023 I'LL pay $1415926,\n\n  it's 83 + 7 = 90.</s><s>x\r\n"
# The pre-tokenizers of SmolLM2, and of Llama 3, OLMo 2 and DeepSeek-R1-Distill; one of one's own.
DIGITS = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
CL100K = pre.Sequence(
    [
        pre.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
QWEN2 = pre.Sequence(
    [
        pre.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
ANYTHING = pre.ByteLevel(add_prefix_space=False, use_regex=False)


def train(pre_tokenizer, special=("<pad>", "<s>", "</s>")):
    """A byte-level BPE tokenizer that puts <s> before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in special],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def write(directory, tokenizer, model_type, name="PreTrainedTokenizerFast", **settings):
    """Saves a tokenizer beside a model's config, under the name of a class."""
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    file = directory / "tokenizer_config.json"
    content = json.loads(file.read_text()) | {"tokenizer_class": name} | settings
    file.write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("pre_tokenizer", "model_type", "name"),
    [
        (DIGITS, "llama", "GPT2Tokenizer"),  # SmolLM2
        (CL100K, "llama", "PreTrainedTokenizerFast"),  # Llama 3
        (CL100K, "llama", "LlamaTokenizerFast"),  # DeepSeek-R1-Distill-Llama
        (CL100K, "qwen2", "LlamaTokenizerFast"),  # DeepSeek-R1-Distill-Qwen
        (CL100K, "olmo2", "GPT2Tokenizer"),  # OLMo 2
        (CL100K, "llama", "GPT2Tokenizer"),
        (DIGITS, "qwen2", "PreTrainedTokenizerFast"),
        (ANYTHING, "qwen2", "Qwen2Tokenizer"),
        (ANYTHING, "gemma2", "GemmaTokenizerFast"),
        (ANYTHING, "mistral", "LlamaTokenizer"),
        (ANYTHING, "llama", "NoSuchTokenizer"),
    ],
)
def test_the_file_says_the_ids(pre_tokenizer, model_type, name, tmp_path):
    made = train(pre_tokenizer)
    path = write(tmp_path, made, model_type, name)
    file = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer = open_tokenizer(path)
    for text in (TEXT, *TEXTS[:2], "</s>", ""):
        assert tokenizer(text)["input_ids"] == file.encode(text).ids
        plain = file.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain
        assert tokenizer.decode(plain) == file.decode(plain, skip_special_tokens=False)
    assert tokenizer.get_vocab() == made.get_vocab()
    assert tokenizer.special_tokens_map == made.special_tokens_map
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_class_that_is_right_stays(tmp_path):
    """What is exported with it can be read where only that class is known."""
    made = train(QWEN2, ("<pad>", "<s>", "</s>", "<|endoftext|>"))
    made._tokenizer.normalizer = normalizers.NFC()
    tokenizer = open_tokenizer(write(tmp_path, made, "qwen2", "Qwen2Tokenizer"))
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert tokenizer(TEXT)["input_ids"] == made(TEXT)["input_ids"]


def test_settings_of_the_files_beside_it(tmp_path):
    made = train(ANYTHING)
    path = write(tmp_path, made, "qwen2", add_bos_token=False, split_special_tokens=True)
    (path / "chat_template.jinja").write_text("from a file of its own")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("for documents")
    tokenizer = open_tokenizer(path)
    assert tokenizer.chat_template == {"default": "from a file of its own", "rag": "for documents"}
    ids = tokenizer("</s>")["input_ids"]
    assert ids[0] == 1  # tokenizer.json adds it, whatever add_bos_token says
    assert 2 not in ids
    assert tokenizer.decode(ids[1:]) == "</s>"


def test_without_a_tokenizer_json(tmp_path):
    made = train(QWEN2, ("<|endoftext|>",))
    made._tokenizer.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer(TEXTS[0])["input_ids"] == made(TEXTS[0], add_special_tokens=False)["input_ids"]


def test_of_the_hub(tmp_path, monkeypatch):
    path = write(tmp_path, train(ANYTHING), "qwen2")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: path)
    file = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert open_tokenizer("owner/name")(TEXT)["input_ids"] == file.encode(TEXT).ids


def test_a_model_reads_what_it_was_trained_with(tmp_path):
    """A tokenizer of one's own beside each architecture, as training writes them."""
    made = train(ANYTHING)
    made.pad_token = made.eos_token
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2"):
        config = config_from_hf({"model_type": model_type, "vocab_size": 400}, "architecture")
        write_model(tmp_path / model_type, config, made, (2, 0), "float32")
        checkpoint = SafetensorsCheckpoint(tmp_path / model_type)
        tokenizer = checkpoint.tokenizer()
        assert tokenizer(TEXT)["input_ids"] == made(TEXT)["input_ids"]
        assert tokenizer.get_vocab() == made.get_vocab()
        assert tokenizer.special_tokens_map == made.special_tokens_map
        assert checkpoint.eos_ids == (0, 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    return write(directory, make_tokenizer(bos=True), "llama")


def added(i):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": "<x>", "special": True, **flags}


TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (TOKENIZER, "", r"tokenizer\.json: not a tokenizer"),
        (TOKENIZER, "{}", r"tokenizer\.json: not a tokenizer"),
        (TOKENIZER, "[" * 10**5, r"tokenizer\.json: not a tokenizer"),
        (TOKENIZER, '{"model":' * 10**4, r"tokenizer\.json: not a tokenizer .*recursion"),
        (TOKENIZER, b"\xff", r"tokenizer\.json: not UTF-8"),
        (CONFIG, "[]", r"tokenizer_config\.json: not a JSON object"),
        (CONFIG, "[" * 10**5, r"tokenizer_config\.json: not JSON"),
        (CONFIG, '{"eos_token": "\\ud800"}', r"tokenizer_config\.json: not valid Unicode"),
        ("special_tokens_map.json", "[]", r"special_tokens_map\.json: not a JSON object"),
        ("added_tokens.json", '{"<x>": "y"}', r"added_tokens\.json: <x> must be an integer"),
        (
            "added_tokens.json",
            '{"<x>": 300000000}',
            r"added_tokens\.json: token id 300000000 is out",
        ),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(whole, file, content, says, tmp_path):
    path = shutil.copytree(whole, tmp_path / "broken")
    (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(path, says)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (TOKENIZER, lambda c: c["model"]["vocab"].update(zz=3 * 10**8), "id 300000000 is out"),
        (TOKENIZER, lambda c: c["model"]["vocab"].update({"zz": 5}), "two tokens have one id"),
        (TOKENIZER, lambda c: c["model"]["vocab"].update({"zz": "5"}), "not a tokenizer"),
        (TOKENIZER, lambda c: c["added_tokens"].append(added(3 * 10**8)), "'<x>' has id 300000000"),
        (TOKENIZER, lambda c: c["added_tokens"].append(added(310)), "has id 310, expected 300"),
        (TOKENIZER, lambda c: c.update(added_tokens=5), "not a tokenizer"),
        (TOKENIZER, lambda c: c.update(added_tokens=[], model={"type": "BPE", "vocab": {},
                                                               "merges": []}), "has no tokens"),
        (TOKENIZER, lambda c: c.update(pre_tokenizer={"type": "None"}), "not a tokenizer"),
        (TOKENIZER, lambda c: c["post_processor"].update(special_tokens={}), "no readable token"),
        (CONFIG, lambda c: c.update(eos_token="</nope>"), "eos_token '</nope>' is no token of"),
        (CONFIG, lambda c: c.update(bos_token="<nope>"), "bos_token '<nope>' is no token of"),
        (CONFIG, lambda c: c.update(eos_token=5), "no readable tokenizer .*eos_token"),
        (CONFIG, lambda c: c.update(model_max_length="x"), "no readable tokenizer"),
        (CONFIG, lambda c: c.update(extra_special_tokens=["the"]), "files beside it change"),
        (CONFIG, lambda c: c.update(added_tokens_decoder=[1]), "must be an object, not"),
        (CONFIG, lambda c: c.update(added_tokens_decoder={"x": {}}), "decoder is not by id"),
        (CONFIG, lambda c: c.update(added_tokens_decoder={"300000000": {}}), "token id 300000000"),
    ],
)  # fmt: skip
def test_contents_that_cannot_be_used(whole, file, change, says, tmp_path):
    path = shutil.copytree(whole, tmp_path / "broken")
    content = json.loads((path / file).read_text())
    change(content)
    (path / file).write_text(json.dumps(content))
    refused(path, says)


@pytest.mark.parametrize("name", [TOKENIZER, CONFIG])
def test_what_is_no_file(whole, name, tmp_path):
    path = shutil.copytree(whole, tmp_path / "broken")
    (path / name).unlink()
    (path / name).mkdir()
    refused(path, f"{name}: not a regular file")
    (path / name).rmdir()
    os.mkfifo(path / name)  # would wait for somebody to write
    refused(path, f"{name}: not a regular file")


def test_no_tokenizer_at_all(tmp_path):
    refused(tmp_path, "no readable tokenizer")
    refused(tmp_path / "absent", "no readable tokenizer")


def refused(path, says):
    with pytest.raises(InputError, match=says) as caught:
        open_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
