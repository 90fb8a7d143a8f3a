"""What M adds to the logits in consistent proxy tuning, computed once and kept on disk.

Letters: B rows, T tokens, C places of a chunk, D model width, V vocabulary of M-, N trained tokens.

Consistent proxy tuning (He et al. 2024) trains theta, which starts as M-, through the logits that
it is decoded with: softmax(s_theta + alpha_train (s_M - s_-)). M and M- do not change, so neither
does s_M - s_- on given examples.

Logits are fixed only up to a constant a token, which cancels among the ids that both models share
but not against the others, whose offset is 0. So what is kept is log p_M - log p_-, both over the
shared ids: there the constant is such that theta = M- gives the other ids, at alpha_train = 1, the
probability that M- gives them. It is also small where it matters, which suits float16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxy_jax.combine import fit
from proxy_jax.errors import InputError
from proxy_jax.jobs import files
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params, hidden_states, unembed
from proxy_jax.reading import Fields, read_json
from proxy_jax.sharding import Placement
from proxy_jax.trio import Trio, identify, load_trio
from train.examples import Example, digest_examples

ROLES = ("base", "antiexpert")
_TYPE = np.dtype("<f2")
_HEAD_TOKENS = 128  # trained tokens a device whose logits are held at once
_SHORTEST = 32
_GIB = 2**30


def with_offsets(
    examples: Sequence[Example],
    trio: Trio,
    directory: Path,
    place: Placement,
    *,
    stacked_layers: bool | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Example]:
    """Gives every example the offsets of its trained tokens, on disk: 2 N V bytes.

    They are computed unless the directory holds them; only then the models are loaded, and let go
    of before it returns. Killed at any instant, the same call goes on where the file ends.

    Args:
      examples: all that will be trained or measured on.
      trio: opened with a base, M, and an antiexpert, M-.
      directory: for offsets.bin and manifest.json; of these examples and models alone.
      place: the mesh and rules to compute on.
      stacked_layers: as in `load_trio`.
      progress: called with (trained tokens done, N) before the first batch and after each.

    Returns:
      The examples with `offsets`, [trained tokens, V] float16, read from the disk as they are used.

    Raises:
      InputError: an example that M or M- cannot read, a directory with other offsets or in use by
        another process, too little disk, logits that are not finite, or a run of several processes.
    """
    if jax.process_count() > 1:
        raise InputError("consistent tuning runs in one process for now")
    _check_examples(examples, trio)
    # The longest first: if the memory does not suffice, that shows at once.
    order = np.argsort([-len(example.tokens) for example in examples], kind="stable")
    ordered = [examples[i] for i in order]
    ends = np.cumsum([np.count_nonzero(example.trained[1:]) for example in ordered])
    total, size = int(ends[-1]), trio.members["antiexpert"].config.vocab_size
    with contextlib.closing(_Cache(directory, _identity(examples, trio), total, size)) as cache:
        progress(cache.done, total)
        if cache.done < total:
            rest = ordered[int(np.searchsorted(ends, cache.done, side="right")) :]
            for batch in _batches(trio, rest, place, stacked_layers):
                for chunk in batch:
                    cache.append(chunk)
                cache.commit()
                progress(cache.done, total)
    offsets = np.memmap(cache.path, _TYPE, "r", shape=(total, size))
    found = dict(zip(order.tolist(), np.split(offsets, ends[:-1]), strict=True))
    return [
        dataclasses.replace(example, offsets=np.asarray(found[i]))
        for i, example in enumerate(examples)
    ]


class _Cache:
    """offsets.bin, [N, V] float16, filled from its start, and manifest.json, which says whose.

    What was committed survives the process; what was appended after that is made again.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], total: int, size: int):
        self.path = directory / "offsets.bin"
        self._manifest = directory / "manifest.json"
        self._identity = identity | {"tokens": total, "vocabulary": size}
        self._row_bytes = size * _TYPE.itemsize
        self._file = files.AppendedFile(self.path)
        try:
            self.done = self._resume()
            if self.done < total:
                self._check_disk(directory, total)
                self._file.truncate(self.done * self._row_bytes)
                self.commit()
        except BaseException:
            self.close()
            raise

    def append(self, rows: np.ndarray) -> None:
        """Writes [n, V] more."""
        self._file.append(rows.astype(_TYPE).tobytes())

    def commit(self) -> None:
        """Keeps what was appended."""
        self._file.sync()
        self.done = self._file.size // self._row_bytes
        content = json.dumps(self._identity | {"done": self.done}, indent=2)
        files.replace(self._manifest, content.encode())

    def close(self) -> None:
        """Lets go of the file and its lock."""
        self._file.close()

    def _resume(self) -> int:
        """How many rows are there."""
        directory = self._manifest.parent
        there = self._file.size // self._row_bytes
        if not self._manifest.exists():
            if there:
                raise InputError(f"{self.path}: exists, but no manifest.json says what made it")
            return 0
        content = read_json(self._manifest)
        done = Fields(str(self._manifest), content).integer("done", 0)
        for name, value in self._identity.items():
            if content.get(name) != value:
                raise InputError(
                    f"{directory}: holds offsets of another run ({name}: {content.get(name)!r}, "
                    f"now {value!r}); choose another directory, or delete it"
                )
        if done > there:
            raise InputError(f"{self.path}: {done} rows are said to be done, and {there} are there")
        return done

    def _check_disk(self, directory: Path, total: int) -> None:
        missing = total * self._row_bytes - self._file.size
        free = shutil.disk_usage(directory).free
        if missing > free:
            raise InputError(
                f"{directory}: the offsets of {total} trained tokens take another "
                f"{missing / _GIB:.1f} GiB of disk, and {free / _GIB:.1f} GiB are free"
            )


def _identity(examples: Sequence[Example], trio: Trio) -> dict[str, Any]:
    """What the offsets depend on."""
    models = identify({role: trio.members[role].spec for role in ROLES})
    dtypes = {role: trio.members[role].spec.dtype for role in ROLES}
    of_models = {role: {**models[role], "dtype": dtypes[role]} for role in ROLES}
    return {"examples": digest_examples(examples), **of_models}


def _check_examples(examples: Sequence[Example], trio: Trio) -> None:
    shared = trio.vocabulary.shared
    for example in examples:
        for role in ROLES:
            limit = trio.members[role].config.max_positions
            if len(example.tokens) - 1 > limit:
                raise InputError(
                    f"line {example.line}: {len(example.tokens) - 1} tokens exceed {role}'s "
                    f"context of {limit}"
                )
        beyond = example.tokens >= len(shared)
        foreign = beyond | ~shared[np.where(beyond, 0, example.tokens)]
        if foreign.any():
            first = int(example.tokens[foreign][0])
            token = trio.members["antiexpert"].tokenizer.convert_ids_to_tokens(first)
            raise InputError(
                f"line {example.line}: id {first} ({token!r}) is another token in the base's "
                "tokenizer than in the antiexpert's, or none"
            )


def _batches(
    trio: Trio, examples: Sequence[Example], place: Placement, stacked_layers: bool | None
) -> Iterator[Iterator[np.ndarray]]:
    """Offsets of a few examples at a time, each time in chunks [n, V] float16."""
    loaded = load_trio(trio, place=place, stacked_layers=stacked_layers)
    parts = place.split("batch")
    start = 0
    while start < len(examples):
        length = _bucket(len(examples[start].tokens) - 1)
        count = _rows(length) * parts
        batch = examples[start : start + count]
        tokens = np.zeros((count, length), np.int32)
        for b, example in enumerate(batch):
            tokens[b, : len(example.tokens) - 1] = example.tokens[:-1]
        configs = tuple(one.config for one in loaded.passes)
        hidden = [
            _hidden(config, place, params, tokens)
            for config, params in zip(configs, loaded.params, strict=True)
        ]
        yield _chunks(trio, configs, place, loaded.params, hidden, batch)
        start += count


def _chunks(
    trio: Trio,
    configs: tuple[ModelConfig, ...],
    place: Placement,
    params: Sequence[Params],
    hidden: Sequence[jax.Array],
    batch: Sequence[Example],
) -> Iterator[np.ndarray]:
    """The heads, over the trained tokens of a batch only."""
    shared = np.zeros(configs[1].vocab_size, bool)
    known = trio.vocabulary.shared[: len(shared)]
    shared[: len(known)] = known
    places = [(b, t) for b, e in enumerate(batch) for t in np.flatnonzero(e.trained[1:])]
    held = _HEAD_TOKENS * place.split("batch")
    for first in range(0, len(places), held):
        here = places[first : first + held]
        index = np.zeros((held, 2), np.int32)
        index[: len(here)] = here
        offsets, finite = _differences(configs, place, params, hidden, index, shared)
        for role, good in zip(ROLES, np.asarray(finite)[:, : len(here)], strict=True):
            if not good.all():
                line = batch[here[int(np.argmin(good))][0]].line
                raise InputError(f"line {line}: logits of {role} are not finite")
        yield np.asarray(offsets)[: len(here)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(config: ModelConfig, place: Placement, params: Params, tokens: jax.Array) -> jax.Array:
    """[B, T, D] of right-padded examples [B, T], one a row."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return hidden_states(config, params, tokens, positions, None, place)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _differences(
    configs: tuple[ModelConfig, ...],
    place: Placement,
    params: Sequence[Params],
    hidden: Sequence[jax.Array],
    index: jax.Array,
    shared: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """log p_M - log p_- over the shared ids.

    Args:
      configs, place: static.
      params, hidden: of M and M-.
      index: [C, 2], the row and place of each token.
      shared: [V] bool; the other ids get 0.

    Returns:
      [C, V] float16, and whether each model's logits are finite, [2, C] bool.
    """
    kept = shared[None]
    log_p, finite = [], []
    for config, tree, x in zip(configs, params, hidden, strict=True):
        x = place.constrain(x[index[:, 0], index[:, 1]][:, None], ("batch", None, "act_embed"))
        logits = fit(unembed(config, tree, x, place)[:, 0], shared.shape[0])
        log_p.append(jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf)))
        finite.append(jnp.all(jnp.isfinite(logits) | ~kept, axis=-1))
    offsets = jnp.where(kept, log_p[0] - log_p[1], 0.0)
    return offsets.astype(_TYPE), jnp.stack(finite)


def _bucket(length: int) -> int:
    """The padded length: a power of two or three quarters of one, so that few are compiled."""
    power = 1 << (max(length, _SHORTEST) - 1).bit_length()
    return power if length > power * 3 // 4 or power == _SHORTEST else power * 3 // 4


def _rows(length: int) -> int:
    """Examples that a device takes at once: enough to be busy, few enough to lose little."""
    tokens = 256 if jax.default_backend() == "cpu" else 2048
    return max(1, tokens // length)
