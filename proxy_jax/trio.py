"""M, M+ and M- as one thing: opened and checked first, loaded when asked."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from proxy_jax.checkpoints.adapters import Layer, put_adapter, read_adapter
from proxy_jax.checkpoints.architecture import Architecture, random_adapter, random_params
from proxy_jax.checkpoints.fingerprint import fingerprint
from proxy_jax.checkpoints.loading import (
    Checkpoint,
    Progress,
    check_tensors,
    load_params,
    model_config,
    open_checkpoint,
)
from proxy_jax.checkpoints.names import tensors
from proxy_jax.checkpoints.native import find_run
from proxy_jax.cpu import products
from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import beside_nothing
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.tokenization import Prompt, Template, Vocabulary, align, check_ids

Role = str
ROLES: tuple[Role, ...] = ("base", "expert", "antiexpert")
Plan = Literal["separate", "stacked", "shared"]
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED = ("", "int8")
_RANK = re.compile(r"rank=([1-9]\d{0,4})")  # of an architecture's adapter


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which model plays a role, and how it is prompted.

    Attributes:
      path: a Hugging Face directory, a GGUF file, a hub id, or a run of train.sft: its directory,
        for the latest checkpoint, or that of one checkpoint (RUN/checkpoints/STEP). A LoRA run
        stands for its base with what it has trained as the adapter.
      dtype: of the weights, caches and activations.
      template: see `Template`.
      adapter: a LoRA adapter to put on the model: a PEFT directory, or a LoRA run or one of its
        checkpoints; empty for none. On an architecture, "rank=16" draws one of that rank.
      quantize: "int8" stores the large weights in 8 bits (proxy_jax.models.quantized); empty keeps
        dtype for all.
    """

    path: str
    dtype: str = "float32"
    template: str = "raw"
    adapter: str = ""
    quantize: str = ""


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a trio, opened but not loaded.

    Attributes:
      spec: which model it is.
      checkpoint: its files, or an Architecture, which has none.
      config: its architecture.
      tokenizer: a transformers tokenizer; None of an Architecture.
      template: how it is prompted.
    """

    spec: ModelSpec
    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: Any
    template: Template


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward pass: a parameter tree that serves one role, or two.

    Attributes:
      roles: whom it serves.
      config: their architecture.
      dtype: of the weights, caches and activations.
      shared: two roles read the same weights, once for both; only adapters differ. Otherwise the
        weights of two roles are stacked along a leading axis.
      quantize: "int8" if the large weights are stored so instead.
    """

    roles: tuple[Role, ...]
    config: ModelConfig
    dtype: str
    shared: bool = False
    quantize: str = ""


@dataclasses.dataclass(frozen=True)
class Trio:
    """The models of one decoding: M, and M+ and M- where present.

    A role that is absent reads as M in the logit arithmetic: s_M + alpha (s_+ - s_M) without an
    anti-expert, s_M + alpha (s_M - s_-) without an expert, s_M with neither.

    Attributes:
      members: by role; always has "base". Their specs name one checkpoint of a run, and a LoRA
        run's base and adapter by themselves.
      vocabulary: how their tokenizers agree.
    """

    members: Mapping[Role, Member]
    vocabulary: Vocabulary

    @property
    def tokenizer(self) -> Any:
        """The trio's tokenizer: M's."""
        return self.members["base"].tokenizer

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles present, M first."""
        return tuple(role for role in ROLES if role in self.members)

    @property
    def is_random(self) -> bool:
        """Whether there are only architectures, whose weights are drawn at random."""
        return isinstance(self.members["base"].checkpoint, Architecture)

    def encode(self, prompt: Prompt) -> dict[Role, list[int]]:
        """Ids of a prompt as each role reads it."""
        return {
            role: member.template.encode(prompt, self.tokenizer, member.tokenizer, role)
            for role, member in self.members.items()
        }

    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: those of every member's files and tokenizer.

        An id ends nothing if no text can have it, or if it is another token in M's tokenizer than
        in the member's.

        Raises:
          InputError: an id that the member itself has no row for.
        """
        ends: set[int] = set()
        for role, member in self.members.items():
            checkpoint, rows = member.checkpoint, member.config.vocab_size
            ids = set(checkpoint.eos_ids)
            if member.tokenizer and member.tokenizer.eos_token_id is not None:
                ids.add(member.tokenizer.eos_token_id)
            check_ids(ids, rows, checkpoint.path, "eos_token_id")
            ends |= ids.difference(self.vocabulary.moved.get(role, ()))
        valid = self.vocabulary.valid
        return tuple(sorted(i for i in ends if i < len(valid) and valid[i]))

    def passes(self, plan: Plan) -> tuple[Pass, ...]:
        """The forward passes of a plan, M's first.

        Raises:
          InputError: plan "stacked" for an expert and anti-expert of different shapes.
        """
        whole = []
        for role in self.roles:
            member = self.members[role]
            spec = member.spec
            whole.append(Pass((role,), member.config, spec.dtype, quantize=spec.quantize))
        if plan == "separate":
            return tuple(whole)
        if plan not in ("stacked", "shared"):
            raise InputError(f"plan {plan!r} is unknown; plans are separate, stacked and shared")
        if len(whole) < 3:
            raise InputError(f"plan {plan!r} needs an expert and an anti-expert")
        base, expert, anti = whole
        specs = [self.members[role].spec for role in ("expert", "antiexpert")]
        if dataclasses.replace(expert, roles=anti.roles) != anti:
            raise InputError(
                f"plan {plan!r} needs an expert and an anti-expert of one shape and dtype; "
                "use plan 'separate'"
            )
        if plan == "stacked" and any(spec.adapter for spec in specs):
            raise InputError("plan 'stacked' has no place for an adapter; use plan 'shared'")
        if plan == "shared" and (specs[0].path != specs[1].path or specs[1].adapter):
            raise InputError(
                "plan 'shared' needs an expert that is the anti-expert's checkpoint with an "
                f"adapter, not {specs[0].path} and {specs[1].path} {specs[1].adapter}"
            )
        both = dataclasses.replace(expert, roles=("expert", "antiexpert"), shared=plan == "shared")
        return base, both

    def tree_key(self, one: Pass) -> tuple[tuple[str, ...], str, str]:
        """What a pass's weights come from; passes with equal keys share them."""
        paths = tuple(self.members[role].spec.path for role in one.roles)
        return paths[:1] if one.shared else paths, one.dtype, one.quantize

    def check_weights(self) -> None:
        """Compares every checkpoint's tensors with its config, and reads the adapters.

        Looks at names and shapes only. Weights of the hub are downloaded.

        Raises:
          InputError: names the file and tensor.
        """
        for role, member in self.members.items():
            table = tensors(member.config)
            check_tensors(member.checkpoint, table, tied=member.config.tied_head)
            if member.spec.adapter and self.is_random:
                _rank(member, role)
            elif member.spec.adapter:
                _adapter(member, role)

    def check_placement(self, place: Placement) -> None:
        """Refuses a mesh that does not divide the models' dimensions."""
        for role, member in self.members.items():
            place.check(member.config, role)


@dataclasses.dataclass(frozen=True)
class LoadedTrio:
    """A trio with its weights on the mesh.

    Attributes:
      trio: the models' descriptions.
      passes: the forward passes of the plan.
      params: one parameter tree a pass; of two roles, the weights have a leading axis of 2, or
        only the adapters if the pass is shared.
      place: the mesh and rules the weights lie on.
      stacked_layers: whether the layers of each model are one array, to be scanned.
    """

    trio: Trio
    passes: tuple[Pass, ...]
    params: tuple[Params, ...]
    place: Placement
    stacked_layers: bool


def open_trio(specs: Mapping[Role, ModelSpec]) -> Trio:
    """Reads configs and tokenizers, and checks that the models fit together. Loads no weights.

    Raises:
      InputError: a model that cannot be read, or models that cannot be combined.
    """
    if "base" not in specs:
        raise InputError("a trio needs a base model")
    members: dict[Role, Member] = {}
    for role in ROLES:
        if role not in specs:
            continue
        spec = _resolve(specs[role])
        _check_spec(spec, role)
        twin = next((m for m in members.values() if m.spec.path == spec.path), None)
        checkpoint = twin.checkpoint if twin else _open(spec)
        members[role] = Member(
            spec=spec,
            checkpoint=checkpoint,
            config=model_config(checkpoint),
            tokenizer=twin.tokenizer if twin else checkpoint.tokenizer(),
            template=Template(spec.template),
        )
    _check_softcaps(members)
    vocabulary = align(
        {role: member.tokenizer for role, member in members.items()},
        {role: member.config.vocab_size for role, member in members.items()},
    )
    trio = Trio(members, vocabulary)
    trio.eos_ids()  # refuses those that are none
    return trio


def describe_trio(
    specs: Mapping[Role, ModelSpec], architectures: Mapping[str, dict[str, Any]]
) -> Trio:
    """Makes a trio of architectures alone: no tokenizers, and weights that `load_trio` draws.

    Args:
      specs: by role.
      architectures: what config.json says, by name; a path that is none of the names is opened,
        for its config alone.

    Raises:
      InputError: a model whose config is neither known nor to be read, or models that cannot be
        combined.
    """
    members: dict[Role, Member] = {}
    for role in ROLES:
        if role not in specs:
            continue
        spec = specs[role]
        _check_spec(spec, role)
        known = architectures.get(spec.path)
        checkpoint = Architecture(Path(spec.path), known or open_checkpoint(spec.path).hf_config)
        config = config_from_hf(checkpoint.hf_config, spec.path)
        members[role] = Member(spec, checkpoint, config, None, Template(spec.template))
    _check_softcaps(members)
    size = members["base"].config.vocab_size
    tokens = min(member.config.vocab_size for member in members.values())
    of_all = np.arange(size) < tokens
    return Trio(members, Vocabulary(size, tokens, of_all, of_all, {}, {}, {}))


def _check_spec(spec: ModelSpec, role: Role) -> None:
    if spec.dtype not in DTYPES:
        raise InputError(f"{role}: dtype {spec.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if spec.quantize not in QUANTIZED:
        raise InputError(f"{role}: quantize {spec.quantize!r} is unknown; use int8, or nothing")


def _resolve(spec: ModelSpec) -> ModelSpec:
    """The files that a spec stands for: paths are absolute, runs are pinned to a checkpoint.

    Raises:
      InputError: a run that cannot be read, or an adapter on a LoRA run.
    """
    path, adapter = _absolute(spec.path), _absolute(spec.adapter)
    run, adapted = find_run(path), find_run(adapter) if adapter else None
    if run and run.rank and adapter:
        raise InputError(f"{path}: a LoRA run, which takes no other adapter, as {adapter}")
    if run and run.rank:
        whole = dataclasses.replace(spec, path=run.base, adapter=str(run.checkpoint))
        return _resolve(whole)  # the base may be a run, too
    return dataclasses.replace(
        spec,
        path=str(run.checkpoint) if run else path,
        adapter=str(adapted.checkpoint) if adapted else adapter,
    )


def _absolute(location: str) -> str:
    """One spelling for every path of what is on disk; hub ids and absent files as they are."""
    path = Path(location).expanduser()
    return os.path.abspath(path) if location and path.exists() else location


def _open(spec: ModelSpec) -> Checkpoint:
    try:
        return open_checkpoint(spec.path)
    except InputError as error:
        if spec.adapter:
            raise InputError(f"base of {spec.adapter}: {error}") from error
        raise


def identify(specs: Mapping[Role, ModelSpec]) -> dict[Role, dict[str, Any]]:
    """Says which models these are, by what is in their files and not by where they lie.

    Returns:
      By role, the fingerprints of the model and of its adapter (proxy_jax.checkpoints.fingerprint)
      and, of a run, the number of the checkpoint.

    Raises:
      InputError: a model that is not there, or whose files cannot be read.
    """
    found: dict[str, str] = {}  # one model may play two roles

    def digest(location: str) -> str:
        if location not in found:
            path = Path(location).expanduser()
            found[location] = fingerprint(path if path.exists() else open_checkpoint(location).path)
        return found[location]

    identities = {}
    for role, given in specs.items():
        spec = _resolve(given)
        runs = [Path(path) for path in (spec.adapter, spec.path) if path]
        identities[role] = {
            "model": digest(spec.path),
            "adapter": digest(spec.adapter) if spec.adapter else "",
            "checkpoint": next((int(run.name) for run in runs if find_run(run)), None),
        }
    return identities


def load_trio(
    base: str | ModelSpec | Trio,
    expert: str | ModelSpec | None = None,
    antiexpert: str | ModelSpec | None = None,
    *,
    plan: Plan = "separate",
    place: Placement | None = None,
    stacked_layers: bool | None = None,
    progress: Progress = lambda parameters: None,
) -> LoadedTrio:
    """Opens a trio, or takes one already opened, and loads its weights, or draws them.

    Args:
      base, expert, antiexpert: paths, hub ids, or specs with a dtype and template.
      plan: separate; stacked (M+ and M- in one pass over a leading axis of 2); or shared (M+ is
        M- with an adapter: one pass over twice the rows, which reads the weights once).
      place: the mesh and rules; one device by default.
      stacked_layers: scan over layers; by default on accelerators only (a scan on CPU copies
        every layer's weights at every step).
      progress: called with the number of parameters after each array.

    Raises:
      InputError: see `open_trio`; also a mesh that does not divide the models.
    """
    if isinstance(base, Trio):
        trio = base
    else:
        given = dict(zip(ROLES, (base, expert, antiexpert), strict=True))
        trio = open_trio(
            {
                role: ModelSpec(spec) if isinstance(spec, str) else spec
                for role, spec in given.items()
                if spec is not None
            }
        )
    place = place or Placement(make_mesh({"data": 1}))
    trio.check_placement(place)
    if stacked_layers is None:
        stacked_layers = place.platform != "cpu"
    passes = trio.passes(plan)
    loaded: dict[Any, Params] = {}
    params = []
    for one in passes:
        key = trio.tree_key(one)
        if key not in loaded:
            roles = one.roles[:1] if one.shared else one.roles
            checkpoints = [trio.members[role].checkpoint for role in roles]
            stored: Any = {
                "stacked": stacked_layers,
                "quantize": one.quantize,
                "turned": _turned(one, place),
            }
            if isinstance(checkpoints[0], Architecture):
                loaded[key] = random_params(
                    one.config, one.dtype, place, copies=len(roles), seed=len(loaded), **stored
                )
            else:
                loaded[key] = load_params(
                    checkpoints, one.config, one.dtype, place, progress=progress, **stored
                )
        params.append(_adapted(trio, one, loaded[key], place))
    return LoadedTrio(trio, passes, tuple(params), place, stacked_layers)


def _turned(one: Pass, place: Placement) -> bool:
    """Whether weights lie as CPUs multiply them fastest; of two stacked ones XLA makes the
    product."""
    kernels = (len(one.roles) == 1 or one.shared) and products.available()
    short = jnp.dtype(one.dtype).itemsize == 2
    return place.platform == "cpu" and (short or kernels)


def _adapted(trio: Trio, one: Pass, params: Params, place: Placement) -> Params:
    """Puts the adapter of a pass's first role, the expert, on its weights."""
    role = one.roles[0]
    member = trio.members[role]
    if not member.spec.adapter:
        return params
    layers = _adapter(member, role)
    params = put_adapter(params, layers, one.dtype, place, turned=_turned(one, place))
    return beside_nothing(params) if one.shared else params


def _adapter(member: Member, role: Role) -> list[Layer]:
    """The matrices of a member's adapter: read, or of an architecture drawn.

    Raises:
      InputError: an adapter that cannot be read.
    """
    if isinstance(member.checkpoint, Architecture):
        return random_adapter(member.config, _rank(member, role))
    return read_adapter(Path(member.spec.adapter).expanduser(), member.config)


def _rank(member: Member, role: Role) -> int:
    """The rank of an architecture's adapter.

    Raises:
      InputError: an adapter that is not so given.
    """
    rank = _RANK.fullmatch(member.spec.adapter)
    if not rank:
        raise InputError(
            f"{role}: adapter is {member.spec.adapter!r}, and {member.spec.path} an architecture, "
            "whose adapter is drawn at random: say its rank, as in rank=16"
        )
    return int(rank[1])


def _check_softcaps(members: Mapping[Role, Member]) -> None:
    caps = {role: member.config.final_softcap for role, member in members.items()}
    if len(set(caps.values())) > 1:
        found = ", ".join(f"{role} {cap}" for role, cap in caps.items())
        raise InputError(
            f"final logit soft-caps differ ({found}): capped and uncapped logits cannot be combined"
        )
