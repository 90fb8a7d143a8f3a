"""A model as a GGUF file, and as the directory that we export it to: the same ids and texts."""

import itertools
import json

import pytest

from decode import Generator, Options
from proxy_jax.checkpoints.loading import load_params, open_checkpoint
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.tokenization import Prompt
from proxy_jax.trio import ModelSpec, load_trio, open_trio
from tests import stored
from tests.real import models
from train.export import export_expert

PROMPTS = 64
WRITTEN = 8  # of the prompts are completed
ODD = [
    "In 2023 we paid $1415926 (not 271).\n\nI'LL say:\thello, it's 3.14.",
    "  two spaces,   three\n\n\n and lines \r\n",
    "naïve café, 日本語のテキスト, العربية, 😀👩\u200d👩\u200d👧 ½ Ⅷ",
    "def f(x_1):\n    return x_1 ** 2  # a comment\n\n\nclass A:\n\tpass\n",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "A text that ends <|endoftext|>",
]


def prompts():
    with open(stored.data("gsm8k/test.jsonl"), encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in itertools.islice(file, PROMPTS)]
    return [*ODD, *questions][:PROMPTS]


def compare(gguf, directory):
    """Exports a model and compares what is made of it with what is made of the file."""
    checkpoint = open_checkpoint(gguf)
    config = config_from_hf(checkpoint.hf_config, gguf)
    place = Placement(make_mesh({"data": 1}))
    params = load_params([checkpoint], config, "float32", place, stacked=False)
    export_expert(
        directory,
        config,
        params,
        checkpoint.tokenizer(),
        gguf,
        dtype="float32",
        eos_ids=checkpoint.eos_ids,
    )
    del params
    texts = prompts()
    trios = [open_trio({"base": ModelSpec(str(path))}) for path in (gguf, directory)]
    for text in texts:
        file, exported = (trio.encode(Prompt(text))["base"] for trio in trios)
        assert file == exported, text
    assert trios[0].eos_ids() == trios[1].eos_ids()
    assert trios[0].eos_ids()
    written = [
        [
            (completion.text, completion.token_ids)
            for completion in Generator(
                load_trio(trio), Options(batch_size=WRITTEN, max_new_tokens=12)
            ).generate(texts[-WRITTEN:])
        ]
        for trio in trios
    ]
    assert written[0] == written[1]
    assert len({text for text, _ in written[0]}) > 1


@pytest.mark.real
def test_smollm2(smollm2_path, tmp_path):
    compare(str(smollm2_path), tmp_path / "smollm2")


@pytest.mark.real_trio
def test_qwen25(tmp_path):
    compare(str(models.path("qwen2.5-coder-0.5b-instruct")), tmp_path / "qwen25")
