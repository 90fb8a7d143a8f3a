"""The library: models, checkpoints, tokenizers, sharding, and the logit arithmetic."""

import sys

from proxy_jax.jobs import last_words

if sys.argv[:1] == ["-m"]:  # python -m decode.PROGRAM or train.PROGRAM, about to be imported
    last_words.answer_interrupts()

from proxy_jax.errors import InputError
from proxy_jax.tokenization import Prompt
from proxy_jax.trio import LoadedTrio, ModelSpec, Trio, load_trio, open_trio

__all__ = ["InputError", "LoadedTrio", "ModelSpec", "Prompt", "Trio", "load_trio", "open_trio"]
