"""What training begins from: a checkpoint, or an architecture with random weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from proxy_jax.checkpoints.architecture import Architecture, random_params
from proxy_jax.checkpoints.loading import Checkpoint, load_params, model_config, open_checkpoint
from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params, init, logical_axes, stack_layers
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.sharding import Placement, is_axes
from proxy_jax.tokenization import check_ids, open_tokenizer


@dataclasses.dataclass(frozen=True)
class Start:
    """A model before training, its weights not yet in memory.

    Attributes:
      model: the architecture.
      tokenizer: a transformers tokenizer.
      eos_ids: ids that end a text, besides the tokenizer's.
      checkpoint: where the weights are; None if training starts from random ones. An Architecture
        has none either, and numbers to measure with take their place.
    """

    model: ModelConfig
    tokenizer: Any
    eos_ids: Sequence[int] = ()
    checkpoint: Checkpoint | None = None

    def params(self, dtype: Any, place: Placement, key: jax.Array, *, stacked: bool) -> Params:
        """The weights, on the mesh: read, or normal(1 / sqrt(inputs)).

        Args:
          dtype: of the parameters; those that training starts from are float32.
          place: the mesh and rules.
          key: of the random weights that training starts from.
          stacked: one array with a leading axis for all layers, instead of a tuple of layers.
        """
        if isinstance(self.checkpoint, Architecture):
            return random_params(self.model, dtype, place, stacked=stacked)
        if self.checkpoint:
            return load_params([self.checkpoint], self.model, dtype, place, stacked=stacked)
        make = lambda key: init(self.model, key)  # noqa: E731
        axes = logical_axes(self.model)
        if stacked:
            make = lambda key: stack_layers(init(self.model, key))  # noqa: E731
            layer = jax.tree.map(lambda a: (None, *a), axes["layers"][0], is_leaf=is_axes)
            axes = {**axes, "layers": layer}
        return jax.jit(make, out_shardings=place.shardings(axes))(key)


def open_start(config: ConfigDict) -> Start:
    """Opens what the config names: `base`, or `architecture` and `tokenizer`.

    Raises:
      InputError: neither or both, something that cannot be read, or a tokenizer with more tokens
        than the architecture has rows.
    """
    architecture = config.architecture.to_dict()
    if bool(config.base) == bool(architecture):
        raise InputError(
            "base names the model to tune, architecture one to train from random weights: "
            f"{'both are' if config.base else 'neither is'} set"
        )
    if config.base and config.tokenizer:
        raise InputError("tokenizer is set, but base has its own; it goes with an architecture")
    if config.base:
        checkpoint = open_checkpoint(os.path.expandvars(config.base))
        model = model_config(checkpoint)
        tokenizer = _with_template(checkpoint.tokenizer(), config.data.chat_template)
        check_ids(checkpoint.eos_ids, model.vocab_size, checkpoint.path, "eos_token_id")
        return Start(model, tokenizer, checkpoint.eos_ids, checkpoint)
    if config.lora.rank:
        raise InputError("lora.rank is set, but random weights leave nothing to adapt; use base")
    if not config.tokenizer:
        raise InputError("tokenizer is empty: which one goes with the architecture?")
    model = config_from_hf(architecture, "architecture")
    tokenizer = open_tokenizer(os.path.expandvars(config.tokenizer))
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1  # len() skips gaps
    if tokens > model.vocab_size:
        raise InputError(
            f"tokenizer has {tokens} tokens, architecture.vocab_size is {model.vocab_size}"
        )
    return Start(model, _with_template(tokenizer, config.data.chat_template))


def _with_template(tokenizer: Any, chat_template: str) -> Any:
    if chat_template:
        tokenizer.chat_template = chat_template  # is exported with the expert, too
    return tokenizer
