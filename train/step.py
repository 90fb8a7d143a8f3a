"""The compiled training step: loss, gradients, update.

Letters: A micro-batches of a step, B rows, T tokens, N trained tokens of a row, V vocabulary,
D model width.

A batch is a dict of arrays [A, B, T]: "tokens", "targets" (the next token of the same example),
"weights" (1 where the target is trained), "segments" (examples packed into one row do not see each
other; 0 is padding) and "positions". Losses and gradients are sums over trained tokens, divided
once by their number in the whole step: a micro-batch or a device counts as much as it has tokens.

Consistent proxy tuning (He et al. 2024) adds "offsets" [A, B, N, V], s_M - s_- at each row's
trained tokens in their order (train.offsets). The loss is then that of
softmax(s_theta + alpha_train (s_M - s_-)).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params, hidden_states, logical_axes, unembed
from proxy_jax.models.lora import attach, with_dropout
from proxy_jax.sharding import Placement

Batch = dict[str, jax.Array]
LOSS_TOKENS = 128  # trained tokens a row whose logits are held at once


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the compiled step is specialised to; hashable, static under jit.

    Attributes:
      model: the architecture.
      optimizer: from train.optimizer.
      compute_dtype: of weights and activations in the forward and backward pass; the parameters
        that are trained stay float32.
      remat: key of proxy_jax.models.decoder.REMAT.
      place: mesh and rules.
      lora_scale: lora_alpha / rank; None trains all parameters.
      lora_dropout: of the adapter's inputs.
      alpha_train: coefficient of the batch's offsets; 0 is plain tuning, without any.
    """

    model: ModelConfig
    optimizer: optax.GradientTransformation
    compute_dtype: str
    remat: str
    place: Placement
    lora_scale: float | None = None
    lora_dropout: float = 0.0
    alpha_train: float = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes; saved and restored as a whole.

    Attributes:
      step: scalar int32, updates made.
      trained: float32 parameters: all of the model's, or an adapter's.
      moments: the optimizer's state.
      key: random key of dropout.
    """

    step: jax.Array
    trained: Any
    moments: Any
    key: jax.Array


def new_state(recipe: Recipe, trained: Any, key: jax.Array) -> TrainState:
    """The state before the first step. The optimizer's state lies where the parameters lie.

    All of it lies on the mesh, scalars too: a restored one is put where this one lies.
    """
    everywhere = jax.jit(lambda x: x, out_shardings=recipe.place.sharding(()))
    moments = optax.tree_map_params(
        recipe.optimizer,
        lambda moment, parameter: jax.device_put(moment, parameter.sharding),
        recipe.optimizer.init(trained),
        trained,
        transform_non_params=everywhere,
    )
    step, key = everywhere((jnp.int32(0), key))
    return TrainState(step, trained, moments, key)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    recipe: Recipe, state: TrainState, frozen: Params | None, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      recipe: static.
      state: donated.
      frozen: the base model's parameters, for LoRA; None when all are trained.
      batch: [A, B, T] arrays; and the offsets, if the recipe has an alpha_train.

    Returns:
      The new state, and scalars: "loss" (mean negative log-likelihood of the trained tokens, nats),
      "grad_norm" (before clipping), "tokens" (without padding), "trained_tokens", and "pairs" (of
      a token and one that it sees, windows not considered).
    """
    step_key = jax.random.fold_in(state.key, state.step)

    def micro(carry, scanned):
        index, one = scanned
        key = jax.random.fold_in(step_key, index)
        grad = jax.grad(loss_sum, argnums=1, has_aux=True)
        gradients, sums = grad(recipe, state.trained, frozen, one, key)
        return jax.tree.map(jnp.add, carry, (gradients, sums)), None

    zeros = (jax.tree.map(jnp.zeros_like, state.trained), (jnp.float32(0), jnp.float32(0)))
    count = batch["tokens"].shape[0]
    (gradients, (total, tokens)), _ = jax.lax.scan(micro, zeros, (jnp.arange(count), batch))
    gradients = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1), gradients)
    updates, moments = recipe.optimizer.update(gradients, state.moments, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    read = batch["segments"] > 0
    metrics = {
        "loss": total / jnp.maximum(tokens, 1),
        "grad_norm": optax.tree.norm(gradients),
        "tokens": jnp.sum(read, dtype=jnp.float32),
        "trained_tokens": tokens,
        "pairs": jnp.sum(jnp.where(read, batch["positions"] + 1, 0), dtype=jnp.float32),
    }
    return TrainState(state.step + 1, trained, moments, state.key), metrics


@functools.partial(jax.jit, static_argnums=0)
def evaluate(
    recipe: Recipe, trained: Any, frozen: Params | None, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Sum of the negative log-likelihoods of a batch [B, T], and how many tokens they are of."""
    return loss_sum(recipe, trained, frozen, batch, None)[1]


def loss_sum(
    recipe: Recipe, trained: Any, frozen: Params | None, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss to differentiate.

    Args:
      batch: [B, T] arrays; and the offsets, [B, N, V], if the recipe has an alpha_train.
      key: of dropout; None is without.

    Returns:
      Sum of -log p(target) over trained tokens, and again (that sum, the number of tokens).
    """
    params = model_params(recipe, trained, frozen, key)
    x, _ = hidden_states(
        recipe.model,
        params,
        batch["tokens"],
        batch["positions"],
        None,
        recipe.place,
        batch["segments"],
        recipe.remat,
    )
    offsets = batch["offsets"] if recipe.alpha_train else None
    total = _negative_log_likelihood(recipe, params, x, batch["targets"], batch["weights"], offsets)
    return total, (total, jnp.sum(batch["weights"]))


def model_params(
    recipe: Recipe, trained: Any, frozen: Params | None, key: jax.Array | None
) -> Params:
    """The parameters the model runs with, in the compute dtype."""
    cast = lambda tree: jax.tree.map(lambda x: x.astype(recipe.compute_dtype), tree)  # noqa: E731
    if recipe.lora_scale is None:
        return cast(trained)
    params = attach(cast(frozen), cast(trained), recipe.lora_scale)
    if key is None or not recipe.lora_dropout:
        return params
    return with_dropout(params, recipe.lora_dropout, key)


def _negative_log_likelihood(
    recipe: Recipe,
    params: Params,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    offsets: jax.Array | None,
) -> jax.Array:
    """Summed over the trained tokens of [B, T]; logits [B, T, V] are never held as a whole."""
    head = {name: params[name] for name in ("embedding", "final_norm", "head") if name in params}
    if not recipe.model.tied_head:
        del head["embedding"]
    return _head_loss(recipe, head, x, targets, weights, offsets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(
    recipe: Recipe,
    head: Params,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    offsets: jax.Array | None,
) -> jax.Array:
    """The loss of hidden states [B, T, D]. Its gradients are made with it, piece by piece, while
    the logits are there: they are computed once."""
    return _head_pieces(recipe, head, x, targets, weights, offsets, gradients=False)[0]


def _head_loss_forward(recipe: Recipe, *arguments: Any) -> tuple[jax.Array, Any]:
    return _head_pieces(recipe, *arguments, gradients=True)


def _head_loss_backward(recipe: Recipe, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    head, x = jax.tree.map(lambda g: (g * gradient).astype(recipe.compute_dtype), kept)
    return head, x, None, None, None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def _head_pieces(
    recipe: Recipe,
    head: Params,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    offsets: jax.Array | None,
    *,
    gradients: bool,
) -> tuple[jax.Array, Any]:
    """The loss, and its gradients by (head, x) in float32 if asked for; None for a frozen head."""
    length = x.shape[1]
    held = min(length, LOSS_TOKENS)
    # The trained tokens of each row come first; pieces that hold none are not computed.
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    order = jnp.pad(order, [(0, 0), (0, -length % held)], constant_values=length)
    trained = jnp.max(jnp.sum(weights != 0, axis=1))
    learns_head = gradients and recipe.lora_scale is None

    def take(array: jax.Array, places: jax.Array) -> jax.Array:
        places = jnp.expand_dims(places, tuple(range(2, array.ndim)))
        return jnp.take_along_axis(array, places, axis=1, mode="fill", fill_value=0)

    def piece(i: jax.Array, carry: Any) -> Any:
        total, head_gradient, x_gradient = carry
        places = jax.lax.dynamic_slice_in_dim(order, i * held, held, axis=1)
        seen, target, weight = take(x, places), take(targets, places), take(weights, places)
        run = lambda head, x: unembed(recipe.model, head, x, recipe.place)  # noqa: E731
        logits, pull_back = jax.vjp(run, head, seen)
        if offsets is not None:  # row by row in the order of `order`
            here = i * held + jnp.arange(held)
            fixed = jnp.take(offsets, here, axis=1, mode="fill", fill_value=0)
            fixed = recipe.place.constrain(fixed, ("batch", None, "vocab"))
            logits += recipe.alpha_train * fixed.astype(jnp.float32)
        top = jnp.max(logits, axis=-1, keepdims=True)
        shares = jnp.exp(logits - top)
        whole = jnp.sum(shares, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)
        losses = (jnp.log(whole) + top - chosen)[..., 0]
        total += jnp.sum(losses * weight)
        if gradients:
            is_target = jax.nn.one_hot(target, logits.shape[-1])
            by_logits = (shares / whole - is_target) * weight[..., None]
            by_head, by_x = pull_back(by_logits)
            x_gradient = jax.lax.dynamic_update_slice_in_dim(
                x_gradient, by_x.astype(jnp.float32), i * held, axis=1
            )
            if learns_head:
                head_gradient = jax.tree.map(jnp.add, head_gradient, by_head)
        return total, head_gradient, x_gradient

    zeros = lambda array: jnp.zeros(array.shape, jnp.float32)  # noqa: E731
    start = (
        jnp.float32(0),
        _place_head(recipe, jax.tree.map(zeros, head)) if learns_head else None,
        zeros(take(x, order)) if gradients else None,
    )
    total, head_gradient, x_gradient = jax.lax.fori_loop(0, -(-trained // held), piece, start)
    if not gradients:
        return total, None
    return total, (head_gradient, take(x_gradient, jnp.argsort(order, axis=1)[:, :length]))


def _place_head(recipe: Recipe, head: Params) -> Params:
    axes = logical_axes(recipe.model)
    return {name: recipe.place.constrain(array, axes[name]) for name, array in head.items()}
