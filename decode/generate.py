"""Decodes a file of prompts with a trio.

    python -m decode.generate --config=configs/qwen25_7b.py \\
        --config.prompts.path=prompts.jsonl --config.output_dir=runs/first --config.alpha=0.7

Reads one JSON object a line, writes outputs.jsonl (text, finish reason, counts) as rows finish, and
manifest.json (config, versions, commit, command, device). Killed at any instant, the same command
goes on where it was. Every field of the config can be set on the command line; configs/defaults.py
explains them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

import launch
from decode import job, memory
from decode.outputs import OutputFile, digest
from decode.requests import Completion, Options
from decode.scheduler import Generator
from proxy_jax.errors import InputError
from proxy_jax.trio import Trio, load_trio, open_trio


def main(config: ConfigDict) -> None:
    """Checks everything, loads the models, decodes, writes."""
    if not config.output_dir:
        raise InputError("output_dir is empty: where do the outputs go?")
    specs, options = job.model_specs(config), job.options(config)
    place, stacked_layers = job.placement(config), job.stacked_layers(config)
    rows = job.read_prompts(config)
    trio = open_trio(specs)
    requests, contexts = job.job_requests(trio, options, rows)
    trio.check_placement(place)
    place.check_divides("batch", options.batch_size, "batch_size")
    passes = trio.passes(config.plan)
    memory.estimate(trio, passes, place, options.batch_size, contexts).check()

    first = jax.process_index() == 0
    inputs = {"prompts": digest(Path(os.path.expandvars(config.prompts.path)).expanduser())}
    directory = Path(config.output_dir).expanduser()
    output = OutputFile(directory, config.to_dict(), inputs) if first else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("output file opened")
    if output is None:
        output = OutputFile(directory, config.to_dict(), inputs, write=False)
    waiting = [request for request in requests if request.row not in output.done]
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("output file read")
    resumed = len(requests) - len(waiting)

    tokens, seconds = 0, 0.0
    if waiting:
        loaded = load_with_progress(trio, config, place, stacked_layers, show=first)
        generator = Generator(loaded, options)
        start = time.perf_counter()
        with tqdm(
            total=len(requests), initial=resumed, unit="row", desc="decoding", disable=not first
        ) as bar:
            for completions in generator.stream(waiting, contexts):
                output.append([record(c, rows, options, config) for c in completions])
                seconds = time.perf_counter() - start
                tokens = generator.new_tokens
                bar.set_postfix_str(f"{tokens / seconds:.1f} tokens/s", refresh=False)
                bar.update(len(completions))
                bar.refresh()
    output.finish(
        {
            "rows": len(waiting),
            "rows_resumed": resumed,
            "new_tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        }
    )
    if first:
        print(f"{len(requests)} rows in {output.path}")


def record(
    completion: Completion, rows: list[job.PromptRow], options: Options, config: ConfigDict
) -> dict[str, Any]:
    """One line of outputs.jsonl."""
    index, sample = divmod(completion.row, options.samples)
    source = rows[index]
    fields: dict[str, Any] = {"row": completion.row, "line": source.line, "sample": sample}
    if config.prompts.id_field:
        fields["id"] = source.id
    fields |= {
        "prompt": source.prompt.text,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "new_tokens": len(completion.token_ids),
        "prompt_tokens": dict(completion.prompt_tokens),
    }
    if config.save_token_ids:
        fields["token_ids"] = list(completion.token_ids)
    return fields


def load_with_progress(
    trio: Trio, config: ConfigDict, place: Any, stacked: bool | None, *, show: bool
):
    """Loads the weights under a progress bar."""
    sizes = {
        trio.tree_key(one): len(one.roles) * memory.parameters(one.config)
        for one in trio.passes(config.plan)
    }
    with tqdm(
        total=sum(sizes.values()),
        unit="",
        unit_scale=True,
        desc="loading parameters",
        disable=not show,
    ) as bar:
        return load_trio(
            trio, plan=config.plan, place=place, stacked_layers=stacked, progress=bar.update
        )


if __name__ == "__main__":
    launch.run(main)
