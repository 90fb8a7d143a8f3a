"""Decodes a file of prompts with a trio.

    python -m decode.generate --config=configs/qwen25_7b.py \\
        --config.prompts.path=prompts.jsonl --config.output_dir=runs/first --config.alpha=0.7

Reads one JSON object a line, writes outputs.jsonl (text, finish reason, counts) as rows finish, and
manifest.json (config, versions, commit, command, device). Killed at any instant, the same command
goes on where it was. With --config.trace=True each row has what every model thought of its tokens
(decode/trace.py), explanation.json the analyses of it (decode/explain.py), and tokens.html the
first texts, coloured. Every field of the config can be set on the command line; configs/defaults.py
explains them.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from configs.defaults import decoding
from decode import job
from decode.explain import Words, read_records, summarise
from decode.outputs import open_output
from decode.requests import Completion
from decode.scheduler import Generator
from decode.token_page import render
from proxy_jax.errors import InputError
from proxy_jax.jobs import files, launch, processes
from proxy_jax.rows import local_path

_PAGE_ROWS = 50  # completions in tokens.html


def main(config: ConfigDict) -> None:
    """Checks everything, loads the models, decodes, writes."""
    if not config.output_dir:
        raise InputError("output_dir is empty: where do the outputs go?")
    rows = job.read_prompts(config)
    opened = job.open_job(config)
    trio, options = opened.trio, opened.options
    requests, contexts = job.job_requests(trio, options, rows)
    opened.estimate(contexts, options.max_new_tokens).check()

    inputs = job.inputs(trio, rows, requests)
    texts = [row.prompt.text for row in rows for _ in range(options.samples)]
    directory = local_path(config.output_dir)
    with contextlib.closing(open_output(directory, job.resolved(config), inputs, texts)) as output:
        waiting = [request for request in requests if request.row not in output.done]
        resumed = len(requests) - len(waiting)
        summary: dict[str, Any] = {"rows": len(waiting), "rows_resumed": resumed}
        if waiting:
            generator = Generator(opened.load(), options)
            start = time.perf_counter()
            with tqdm(
                total=len(requests),
                initial=resumed,
                unit="row",
                desc="decoding",
                disable=not processes.is_first(),
            ) as bar:
                for completions in generator.stream(waiting, contexts):
                    ids = config.save_token_ids
                    output.append([record(c, rows, options.samples, ids) for c in completions])
                    speed = generator.new_tokens / (time.perf_counter() - start)
                    bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
                    bar.update(len(completions))
                    bar.refresh()
            summary |= {"new_tokens": generator.new_tokens, "tokens_per_second": round(speed, 2)}
        output.finish(summary)
    if processes.is_first():
        if config.trace:
            explain(output.path, trio.tokenizer)
        print(f"{len(requests)} rows in {output.path}")


def record(
    completion: Completion, rows: list[job.PromptRow], samples: int, token_ids: bool = False
) -> dict[str, Any]:
    """One line of outputs.jsonl.

    Args:
      completion: of one of the prompts.
      rows: the prompts.
      samples: completions of each.
      token_ids: whether the line has them; with a trace it does.
    """
    index, sample = divmod(completion.row, samples)
    source = rows[index]
    fields: dict[str, Any] = {"row": completion.row, "line": source.line, "sample": sample}
    if source.id is not None:
        fields["id"] = source.id
    fields |= {
        "prompt": source.prompt.text,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "new_tokens": len(completion.token_ids),
        "prompt_tokens": dict(completion.prompt_tokens),
    }
    if token_ids or completion.trace:
        fields["token_ids"] = list(completion.token_ids)
    if completion.trace:
        fields["trace"] = completion.trace.as_dict()
    return fields


def explain(path: Path, tokenizer: Any) -> None:
    """Writes explanation.json and tokens.html beside recorded outputs."""
    words = Words(tokenizer)
    records = list(read_records(path, words))
    summary = json.dumps(summarise(records), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = render(records[:_PAGE_ROWS], words, f"What the tuning changed: {path.parent.name}")
    files.replace(path.parent / "explanation.json", summary.encode())
    files.replace(path.parent / "tokens.html", page.encode())


if __name__ == "__main__":
    launch.run(main, lambda _: decoding())
