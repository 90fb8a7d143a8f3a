"""The library: models, checkpoints, tokenizers, sharding, and the logit arithmetic."""

from proxy_jax.errors import InputError
from proxy_jax.tokenization import Prompt
from proxy_jax.trio import LoadedTrio, ModelSpec, Trio, load_trio, open_trio

__all__ = ["InputError", "LoadedTrio", "ModelSpec", "Prompt", "Trio", "load_trio", "open_trio"]
