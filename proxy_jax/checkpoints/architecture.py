"""Models without files: an architecture, its weights drawn at random on the devices.

How fast a model is, and how much memory it takes, does not depend on what its weights say.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from proxy_jax.checkpoints.adapters import Layer, Matrices
from proxy_jax.checkpoints.loading import param_shapes
from proxy_jax.checkpoints.names import Tensor, tensors
from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params, abstract_params, init
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import MODULES
from proxy_jax.models.quantized import Quantized, map_weights, quantise
from proxy_jax.models.turned import turn
from proxy_jax.sharding import Placement


@dataclasses.dataclass
class Architecture:
    """A Checkpoint (checkpoints/loading.py) that states an architecture and holds no numbers.

    Attributes:
      path: its name.
      hf_config: what config.json would say.
    """

    path: Path
    hf_config: dict[str, Any]

    @property
    def at_hand(self) -> bool:
        """There are no weights to look at."""
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that such a model has."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensors[name].source_shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Refuses.

        Raises:
          InputError: always.
        """
        raise InputError(f"{self.path}: an architecture, which has no weights to read")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """No id ends a text."""
        return ()

    def tokenizer(self) -> Any:
        """Refuses.

        Raises:
          InputError: always.
        """
        raise InputError(f"{self.path}: an architecture, which has no tokenizer")

    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        config = config_from_hf(self.hf_config, str(self.path))
        return {tensor.name: tensor for tensor in tensors(config)}


def random_params(
    config: ModelConfig,
    dtype: Any,
    place: Placement,
    *,
    stacked: bool,
    copies: int = 1,
    quantize: str = "",
    turned: bool = False,
    seed: int = 0,
) -> Params:
    """Draws a model's weights where `load_params` would put them, one layer at a time.

    Args:
      config, dtype, place, stacked, quantize, turned: as in loading.load_params.
      copies: models side by side, with a leading axis for the model if there are two or more.
      seed: of all numbers.
    """
    one = config.of_one_layer()

    def store(params: Params) -> Params:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        if quantize:
            return map_weights(_quantised, params)
        return map_weights(turn, params) if turned else params

    def layer(key: jax.Array) -> Params:
        return store(init(one, key)["layers"][0])

    def rest(key: jax.Array) -> Params:
        drawn = init(one, key)
        return store({name: drawn[name] for name in drawn if name != "layers"})

    shapes = param_shapes(
        config, dtype, place, stacked=stacked, copies=copies, quantize=quantize, turned=turned
    )
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    of_layers = shardings.pop("layers")
    lead = (copies,) if copies > 1 else ()
    key, layers_key = jax.random.split(jax.random.key(seed))
    params = jax.jit(_for_each(rest, len(lead)), out_shardings=shardings)(
        jax.random.split(key, lead)
    )
    keys = jax.random.split(layers_key, (config.num_layers, *lead))
    if stacked:
        draw = jax.jit(_for_each(layer, len(lead) + 1), out_shardings=of_layers)
        return {**params, "layers": draw(keys.swapaxes(0, len(lead)))}
    draw = jax.jit(_for_each(layer, len(lead)), out_shardings=of_layers[0])
    return {**params, "layers": tuple(draw(key) for key in keys)}


def random_adapter(config: ModelConfig, rank: int, seed: int = 0) -> list[Layer]:
    """Draws an adapter of every linear layer, which changes a model as much as A B of its size.

    Args:
      config: the model's.
      rank: R.
      seed: of all numbers.
    """
    generator = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...], inputs: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32) / np.float32(math.sqrt(inputs))

    layers: list[Layer] = []
    for params in abstract_params(config)["layers"]:
        layer: Layer = {}
        for part, name, inputs in MODULES.values():
            shape = params[part][name].shape
            into, out = shape[:inputs], shape[inputs:]
            a, b = normal((*into, rank), math.prod(into)), normal((rank, *out), rank)
            layer.setdefault(part, {})[name] = Matrices(a, b, scale=0.1)
        layers.append(layer)
    return layers


def _quantised(weight: jax.Array, inputs: int) -> Quantized:
    outputs_first = turn(weight, inputs).values
    return Quantized(*quantise(outputs_first, weight.ndim - inputs))


def _for_each(function: Any, axes: int) -> Any:
    """Maps a function of a key over so many leading axes of keys, one after the other."""
    for _ in range(axes):
        function = functools.partial(jax.lax.map, function)
    return function
