"""A decoding job as its config says: models, options, placement and prompts, checked.

`open_job` is how every program opens, checks and refuses: nothing is loaded before all of it holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from decode import memory
from decode.requests import Options, Request, as_schedule
from decode.sampling import INT32, Sampling, Truncation
from decode.scheduler import longest_contexts, make_requests
from proxy_jax.errors import InputError
from proxy_jax.jobs import processes
from proxy_jax.reading import Fields, reading
from proxy_jax.rows import Row, local_path, read_jsonl
from proxy_jax.sharding import Placement, ShardingRules, make_mesh
from proxy_jax.tokenization import Prompt, format_fields
from proxy_jax.trio import (
    ROLES,
    LoadedTrio,
    ModelSpec,
    Plan,
    Role,
    Trio,
    describe_trio,
    identify,
    load_trio,
    open_trio,
)


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


@dataclasses.dataclass(frozen=True)
class Job:
    """The models of a decoding job, opened and checked, but not loaded.

    Attributes:
      trio: the models; one alone plays the base.
      options: how it decodes.
      place: the mesh and rules.
      plan: which models share a pass.
      stacked_layers: whether layers are scanned; None leaves it to the devices.
    """

    trio: Trio
    options: Options
    place: Placement
    plan: Plan
    stacked_layers: bool | None

    def estimate(
        self, contexts: Mapping[Role, int], new_tokens: int, batch: int | None = None
    ) -> memory.Estimate:
        """Tells how much memory the job needs.

        Args:
          contexts: longest context by role, new tokens included.
          new_tokens: most new tokens a row.
          batch: rows; by default the options'.
        """
        passes = self.trio.passes(self.plan)
        rows = batch or self.options.batch_size
        return memory.estimate(self.trio, passes, self.place, rows, contexts, new_tokens)

    def load(self) -> LoadedTrio:
        """Loads the weights, or draws an architecture's, under a progress bar.

        Raises:
          InputError: a checkpoint that is damaged.
        """
        trio = self.trio
        keys = {one: trio.tree_key(one) for one in trio.passes(self.plan)}
        sizes = {key: len(key[0]) * memory.parameters(one.config) for one, key in keys.items()}
        hidden = trio.is_random or not processes.is_first()
        with tqdm(
            total=sum(sizes.values()),
            unit="",
            unit_scale=True,
            desc="loading parameters",
            disable=hidden,
        ) as bar:
            return load_trio(
                trio,
                plan=self.plan,
                place=self.place,
                stacked_layers=self.stacked_layers,
                progress=bar.update,
            )


def open_job(
    config: ConfigDict,
    *,
    weights: bool = True,
    architectures: Mapping[str, dict[str, Any]] | None = None,
) -> Job:
    """Opens the models of a config, and checks all that can be without prompts.

    Args:
      config: the job's.
      weights: also compare every tensor's name and shape, for which weights of the hub are
        downloaded.
      architectures: config.json by name; where a path is one of the names, all models are
        architectures, with random weights.

    Raises:
      InputError: a field that is missing or out of range, a model that cannot be read, models that
        cannot be combined, or a mesh that does not divide them.
    """
    # The fields first: opening models can take seconds.
    specs, fields = model_specs(config), (options(config), placement(config), plan(config))
    layers = stacked_layers(config)
    job = Job(_open_trio(specs, architectures or {}), *fields, layers)
    job.trio.passes(job.plan)
    job.trio.check_placement(job.place)
    job.place.check_divides("batch", job.options.batch_size, "batch_size")
    if weights:
        job.trio.check_weights()
    return job


def _open_trio(
    specs: Mapping[Role, ModelSpec], architectures: Mapping[str, dict[str, Any]]
) -> Trio:
    if any(spec.path in architectures for spec in specs.values()):
        return describe_trio(specs, architectures)
    return open_trio(specs)


def model_specs(config: ConfigDict) -> dict[Role, ModelSpec]:
    """The models that the config's method runs; one alone plays the base.

    Raises:
      InputError: a field that is missing or of another type, an unknown method, or one whose model
        has no path.
    """
    specs: dict[Role, ModelSpec] = {}
    for role in ROLES:
        fields = _section(config, role)
        path = fields.string("path")
        spec = ModelSpec(
            os.path.expandvars(path),
            fields.string("dtype"),
            fields.string("template"),
            os.path.expandvars(fields.string("adapter")),
            fields.string("quantize"),
        )
        if path:
            specs[role] = spec
    method = _fields(config).string("method")
    if method == "proxy":
        if "base" not in specs:
            raise InputError("base.path is empty: which model is M?")
        return specs
    if method not in ROLES:
        raise InputError(f"method {method!r} is unknown; use proxy, {', '.join(ROLES)}")
    if method not in specs:
        raise InputError(f"method is {method!r}, but {method}.path is empty")
    return {"base": specs[method]}


def plan(config: ConfigDict) -> Plan:
    """The config's plan; one model alone has none."""
    fields = _fields(config)
    return fields.string("plan") if fields.string("method") == "proxy" else "separate"


def options(config: ConfigDict) -> Options:
    """How the config says to decode.

    Raises:
      InputError: a field that is missing, of another type, or out of range.
    """
    fields = _fields(config)
    sampling, base = _section(config, "sampling"), _section(config, "base_filter")
    given = {
        field.name: _present(fields, field.name)
        for field in dataclasses.fields(Options)
        if field.name not in ("alpha", "sampling", "base_filter", "eos_ids")
    }
    return Options(
        **given,
        alpha=as_schedule(_present(fields, "alpha_schedule") or _present(fields, "alpha")),
        sampling=Sampling(
            _present(sampling, "temperature"),
            Truncation(*(_present(sampling, name) for name in ("top_k", "top_p", "min_p"))),
        ),
        base_filter=Truncation(top_p=_present(base, "top_p"), min_p=_present(base, "min_p")),
        eos_ids=_present(fields, "eos_ids") or None,
    )


def placement(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Placement:
    """The mesh and rules of the config.

    Args:
      config: the job's.
      devices: those of the mesh, by default all there are.

    Raises:
      InputError: a mesh that does not fit the devices, or an unknown logical axis.
    """
    replicate, mesh = _fields(config).array("replicate", str), _section(config, "mesh")
    known = {field.name for field in dataclasses.fields(ShardingRules)}
    if unknown := set(replicate) - known:
        raise InputError(f"replicate: {min(unknown)!r} is not one of {', '.join(sorted(known))}")
    rules = ShardingRules(**dict.fromkeys(replicate))
    shape = {str(axis): mesh.integer(str(axis), -1, INT32) for axis in mesh.fields}
    return Placement(make_mesh(shape, devices), rules)


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as a dict; its mesh, which may say -1, has the sizes that it has here."""
    mesh = placement(config).mesh
    assert mesh is not None
    return config.to_dict() | {"mesh": dict(mesh.shape)}


def stacked_layers(config: ConfigDict) -> bool | None:
    """Whether layers are scanned; None leaves it to the backend."""
    known = {"auto": None, "scanned": True, "unrolled": False}
    layers = _fields(config).string("layers")
    if layers not in known:
        raise InputError(f"layers {layers!r} is unknown; use {', '.join(known)}")
    return known[layers]


def read_prompts(config: ConfigDict) -> list[PromptRow]:
    """Reads the prompt file.

    Raises:
      InputError: names the line that is malformed, lacks a field, or is empty.
    """
    fields, prompts = _fields(config), _section(config, "prompts")
    location, limit = prompts.string("path"), prompts.integer("limit", 0)
    if not location:
        raise InputError("prompts.path is empty: which JSONL file holds the prompts?")
    path = local_path(location)
    first = itertools.islice(read_jsonl(path), min(limit, sys.maxsize) or None)
    rows = [_prompt_row(fields, prompts, row) for row in first]
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
    """Tells what outputs depend on besides the config: the models, what they read and end at.

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


def _prompt_row(fields: Fields, prompts: Fields, row: Row) -> PromptRow:
    template, id_field = prompts.string("template"), prompts.string("id_field")
    alpha_field = fields.string("alpha_field")
    text = _filled(template, row) if template else row.text(prompts.string("field"))
    alpha = row.field(alpha_field) if alpha_field else None
    identity = row.field(id_field) if id_field else None
    with reading(f"{row.where}: {id_field}", "no value that JSON has"):
        json.dumps(identity, allow_nan=False)  # outputs repeat it
    return PromptRow(
        line=row.number,
        prompt=Prompt(text, fields.string("system_prompt"), fields.string("response_prefix")),
        id=identity,
        alpha=None if alpha is None else as_schedule(alpha, f"{row.where}: {alpha_field}"),
    )


def _filled(template: str, row: Row) -> str:
    """The template with a row's fields in it."""
    where = f"prompts.template {template!r}"
    format_fields(template, where, of_texts=False)
    with reading(where, "cannot be filled in"):
        try:
            text = template.format_map(row.fields)
        except KeyError as error:
            row.field(str(error.args[0]))  # raises, if the row lacks the field
            raise
    if not text.strip():
        raise InputError(f"{row.where}: the prompt is empty")
    return text


def _fields(config: ConfigDict) -> Fields:
    return Fields("config", config.to_dict())


def _section(config: ConfigDict, name: str) -> Fields:
    section = _fields(config).inner(name)
    if section is None:
        raise InputError(f"config: {name} is missing")
    return section


def _present(fields: Fields, name: str) -> Any:
    """A value that is checked elsewhere, but must be there."""
    if fields.fields.get(name) is None:
        raise InputError(f"{fields.where}: {name} is missing")
    return fields.fields[name]
