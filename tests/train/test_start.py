"""What training begins from: tokenizers and ids that fit the model."""

import json

import pytest
from ml_collections import ConfigDict

from configs.train.defaults import sft
from proxy_jax.errors import InputError
from tests.trios import TOKENS, make_tokenizer
from train.start import open_start

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write(directory, **fields):
    make_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(ARCHITECTURE | fields))
    return directory


def test_a_tokenizer_that_leaves_ids_out(tmp_path):
    """As many tokens as rows are too many, if the last have ids beyond."""
    config = sft()
    config.tokenizer = str(write(tmp_path))
    config.architecture = ConfigDict(ARCHITECTURE)
    assert open_start(config).model.vocab_size == TOKENS
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 400
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"tokenizer has 401 tokens, .* is {TOKENS}"):
        open_start(config)


def test_an_end_that_the_base_has_no_row_for(tmp_path):
    config = sft()
    config.base = str(write(tmp_path, eos_token_id=[2, TOKENS]))
    with pytest.raises(InputError, match=f"eos_token_id {TOKENS} is out of range"):
        open_start(config)


def test_a_tokenizer_beside_a_base(tmp_path):
    config = sft()
    config.base = config.tokenizer = str(write(tmp_path))
    with pytest.raises(InputError, match="tokenizer is set, but base has its own"):
        open_start(config)
