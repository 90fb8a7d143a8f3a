"""Looks at a trio before anything heavy is loaded, and says plainly what is wrong.

    python -m decode.check --config=configs/qwen25_7b.py

Prints each model's family, size and dtype, how the vocabularies agree, the logit soft-caps, the
prompt of each role for the first example, and the memory a device needs. Exits with status 2 and
one line if the job cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs.defaults import decoding
from decode import job, memory
from proxy_jax.jobs import launch
from proxy_jax.tokenization import Prompt
from proxy_jax.trio import Trio

_EXAMPLE = "What is the capital of France?"


def main(config: ConfigDict) -> None:
    """Prints the report."""
    opened = job.open_job(config, weights=False)
    trio, options = opened.trio, opened.options
    print_models(trio)
    print_vocabulary(trio, trio.eos_ids() if options.eos_ids is None else options.eos_ids)
    if config.prompts.path:
        rows = job.read_prompts(config)
    else:
        rows = [job.PromptRow(0, Prompt(_EXAMPLE, config.system_prompt, config.response_prefix))]
    print_prompts(trio, rows[0].prompt)
    requests, contexts = job.job_requests(trio, options, rows)
    estimate = opened.estimate(contexts, options.max_new_tokens)
    print_memory(estimate, contexts, len(requests), options.batch_size)
    estimate.check()
    if all(member.checkpoint.at_hand for member in trio.members.values()):
        trio.check_weights()
        print("\nready")
    else:
        print("\nready, once the weights are downloaded")


def print_models(trio: Trio) -> None:
    """One line a role: what it is."""
    print("models")
    for role, member in trio.members.items():
        config = member.config
        size = memory.parameters(config) / 1e9
        caps = f"soft-cap {config.final_softcap:g}" if config.final_softcap else "no soft-cap"
        print(
            f"  {role:10} {config.family}, {size:.2f} B parameters in "
            f"{member.spec.quantize or member.spec.dtype}, "
            f"{config.num_layers} layers, context {config.max_positions}, {caps}\n"
            f"             {member.spec.path}"
        )


def print_vocabulary(trio: Trio, ends: Sequence[int]) -> None:
    """Prints how the tokenizers agree, and the tokens that end a text, by id and name."""
    vocabulary = trio.vocabulary
    print(f"\nvocabulary\n  {vocabulary.size} rows, {vocabulary.tokens} tokens")
    print(f"  {int(vocabulary.shared.sum())} ids shared by all roles; only these get the offset")
    words = trio.tokenizer.convert_ids_to_tokens
    for role, moved in vocabulary.moved.items():
        examples = "".join(f" {i}: {words(i)!r}" for i in moved[:3])
        print(f"  {role}: {len(moved)} moved{examples}, {vocabulary.absent[role]} absent")
    for role, padding in vocabulary.padding.items():
        print(f"  {role}: {padding} padding rows, masked")
    names = [f"{i} {words(i)!r}" if 0 <= i < vocabulary.size else f"{i}, no id" for i in ends]
    print(f"  texts end at {', '.join(names) or 'no id'}")


def print_prompts(trio: Trio, prompt: Prompt) -> None:
    """What each role reads for one example."""
    print("\nprompts of the first example")
    for role, ids in trio.encode(prompt).items():
        text = trio.tokenizer.decode(ids)
        print(f"  {role}, template {trio.members[role].spec.template!r}, {len(ids)} tokens")
        print("".join(f"    | {line}\n" for line in text.split("\n")), end="")


def print_memory(
    estimate: memory.Estimate, contexts: dict[str, int], requests: int, batch: int
) -> None:
    """What a device needs."""
    gib = memory.GIB
    print(f"\nmemory a device ({requests} completions, {batch} at a time)")
    for role, weights in estimate.weights.items():
        print(
            f"  {role:10} weights {weights / gib:7.2f} GiB, "
            f"cache {estimate.caches[role] / gib:6.2f} GiB for {contexts[role]} tokens a row"
        )
    have = "unknown" if estimate.available is None else f"{estimate.available / gib:.2f} GiB"
    print(f"  logits     {estimate.logits / gib:.2f} GiB")
    print(f"  prefill    {estimate.prefill / gib:.2f} GiB, before the logits")
    print(f"  total      {estimate.total / gib:.2f} GiB of {have}")


if __name__ == "__main__":
    launch.run(main, lambda _: decoding())
