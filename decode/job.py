"""A decoding job as its config says: specs, options, placement and prompts, checked."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from decode.requests import Options, Request, as_schedule
from decode.sampling import Sampling, Truncation
from decode.scheduler import longest_contexts, make_requests
from proxy_jax.errors import InputError
from proxy_jax.rows import Row, local_path, read_jsonl
from proxy_jax.sharding import Placement, ShardingRules, make_mesh
from proxy_jax.tokenization import Prompt
from proxy_jax.trio import ROLES, ModelSpec, Plan, Role, Trio, identify


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One line of the prompt file.

    Attributes:
      line: its number, from 1.
      prompt: the logical prompt.
      id: the value of the id field; None without one.
      alpha: the row's own coefficient or schedule; None without one.
    """

    line: int
    prompt: Prompt
    id: Any = None
    alpha: Any = None


def model_specs(config: ConfigDict) -> dict[Role, ModelSpec]:
    """The models that the config's method runs; one alone plays the base.

    Raises:
      InputError: an unknown method, or one whose model has no path.
    """
    specs: dict[Role, ModelSpec] = {
        role: ModelSpec(
            os.path.expandvars(config[role].path),
            config[role].dtype,
            config[role].template,
            os.path.expandvars(config[role].adapter),
            config[role].quantize,
        )
        for role in ROLES
        if config[role].path
    }
    if config.method == "proxy":
        if "base" not in specs:
            raise InputError("base.path is empty: which model is M?")
        return specs
    if config.method not in ROLES:
        raise InputError(f"method {config.method!r} is unknown; use proxy, {', '.join(ROLES)}")
    if config.method not in specs:
        raise InputError(f"method is {config.method!r}, but {config.method}.path is empty")
    return {"base": specs[config.method]}


def plan(config: ConfigDict) -> Plan:
    """The config's plan; one model alone has none."""
    return config.plan if config.method == "proxy" else "separate"


def options(config: ConfigDict) -> Options:
    """How the config says to decode.

    Raises:
      InputError: a value out of range.
    """
    sampling, base = config.sampling, config.base_filter
    _check_range("sampling.temperature", sampling.temperature, 0.0, float("inf"))
    _check_range("sampling.top_k", sampling.top_k, 0, float("inf"))
    for name, part in (("sampling", sampling), ("base_filter", base)):
        _check_range(f"{name}.top_p", part.top_p, 0.0, 1.0)
        _check_range(f"{name}.min_p", part.min_p, 0.0, 1.0)
    filtered = base.top_p < 1.0 or base.min_p > 0.0
    return Options(
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        alpha=as_schedule(config.alpha_schedule or config.alpha),
        beta=config.beta,
        sampling=Sampling(sampling.temperature or None, _truncation(sampling)),
        samples=config.samples,
        seed=config.seed,
        base_filter=_truncation(base) if filtered else None,
        stop=tuple(config.stop),
        banned=tuple(config.banned),
        banned_first=tuple(config.banned_first),
        min_new_tokens=config.min_new_tokens,
        repetition_penalty=config.repetition_penalty,
        eos_ids=tuple(config.eos_ids) or None,
        chunk_steps=config.chunk_steps,
        trace=config.trace,
    )


def placement(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Placement:
    """The mesh and rules of the config.

    Args:
      config: the job's.
      devices: those of the mesh, by default all there are.

    Raises:
      InputError: a mesh that does not fit the devices, or an unknown logical axis.
    """
    known = {field.name for field in dataclasses.fields(ShardingRules)}
    if unknown := set(config.replicate) - known:
        raise InputError(
            f"replicate: {sorted(unknown)[0]!r} is not one of {', '.join(sorted(known))}"
        )
    rules = ShardingRules(**dict.fromkeys(config.replicate))
    return Placement(make_mesh(config.mesh.to_dict(), devices), rules)


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as a dict; its mesh, which may say -1, has the sizes that it has here."""
    mesh = placement(config).mesh
    assert mesh is not None
    return config.to_dict() | {"mesh": dict(mesh.shape)}


def stacked_layers(config: ConfigDict) -> bool | None:
    """Whether layers are scanned; None leaves it to the backend."""
    known = {"auto": None, "scanned": True, "unrolled": False}
    if config.layers not in known:
        raise InputError(f"layers {config.layers!r} is unknown; use {', '.join(known)}")
    return known[config.layers]


def read_prompts(config: ConfigDict) -> list[PromptRow]:
    """Reads the prompt file.

    Raises:
      InputError: names the line that is malformed, lacks a field, or is empty.
    """
    prompts = config.prompts
    if not prompts.path:
        raise InputError("prompts.path is empty: which JSONL file holds the prompts?")
    if prompts.limit < 0:
        raise InputError(f"prompts.limit must be at least 0, not {prompts.limit}")
    path = local_path(prompts.path)
    first = itertools.islice(read_jsonl(path), prompts.limit or None)
    rows = [_prompt_row(config, row) for row in first]
    if not rows:
        raise InputError(f"{path}: no prompts")
    return rows


def job_requests(
    trio: Trio, options: Options, rows: list[PromptRow]
) -> tuple[list[Request], dict[str, int]]:
    """All requests of a job, and its longest context by role.

    Raises:
      InputError: names the prompt that is too long for a model.
    """
    alphas = [options.alpha if row.alpha is None else row.alpha for row in rows]
    prompts = [row.prompt for row in rows]
    names = [f"line {row.line}" for row in rows]
    requests = make_requests(trio, options, prompts, alphas, names)
    return requests, longest_contexts(requests)


def inputs(trio: Trio, rows: Sequence[PromptRow], requests: Sequence[Request]) -> dict[str, Any]:
    """What a job's outputs depend on besides its config: its models and what they read and end at.

    Raises:
      InputError: a model's file that cannot be read.
    """
    prompts = hashlib.sha256()
    for row in rows:
        prompts.update(repr((row.line, row.id, row.prompt.text)).encode("utf-8", "surrogatepass"))
    for request in requests:
        prompts.update(repr((request.alpha, request.max_new_tokens, *request.ids)).encode())
        for ids in request.ids.values():
            prompts.update(np.asarray([len(ids), *ids], np.int64).tobytes())
    return {
        "prompts": prompts.hexdigest(),
        "ends": list(trio.eos_ids()),
        **identify({role: member.spec for role, member in trio.members.items()}),
    }


def _prompt_row(config: ConfigDict, row: Row) -> PromptRow:
    prompts = config.prompts
    if prompts.template:
        try:
            text = prompts.template.format_map(row.fields)
        except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            if isinstance(error, KeyError):
                row.field(str(error.args[0]))  # raises, if the row lacks the field
            raise InputError(f"prompts.template {prompts.template!r}: {error}") from error
        if not text.strip():
            raise InputError(f"{row.where}: the prompt is empty")
    else:
        text = row.text(prompts.field)
    alpha = row.field(config.alpha_field) if config.alpha_field else None
    return PromptRow(
        line=row.number,
        prompt=Prompt(text, config.system_prompt, config.response_prefix),
        id=row.field(prompts.id_field) if prompts.id_field else None,
        alpha=None if alpha is None else as_schedule(alpha, f"{row.where}: {config.alpha_field}"),
    )


def _truncation(part: ConfigDict) -> Truncation:
    return Truncation(
        top_k=part.get("top_k") or None,
        top_p=part.top_p if part.top_p < 1.0 else None,
        min_p=part.min_p or None,
    )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{name} must be between {low:g} and {high:g}, not {value}")
