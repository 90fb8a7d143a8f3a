"""The same trio in an eager torch loop with growing masks, random weights, on the same device."""

from __future__ import annotations

from decode.timing import Case
from decode.torch_loop import TorchTrio
from device_check.figures import Record
from device_check.sizes import Sizes


def run(sizes: Sizes, record: Record) -> None:
    """Records milliseconds a step, after one run to warm up."""
    trio = sizes.trio(("separate", "bfloat16"))
    members = list(trio.members.values())
    models = TorchTrio([member.checkpoint.hf_config for member in members], "bfloat16")
    vocabulary = min(member.config.vocab_size for member in members)
    new_tokens = max(2, sizes.new_tokens // 2)
    short, long = sizes.prompts
    cases = [Case(batch, short, new_tokens) for batch in sizes.batches]
    cases.insert(2, Case(sizes.middle, long, new_tokens))
    for case in cases:
        tokens = case.tokens(vocabulary)
        for name, alone in (("trio", False), ("M alone", True)):
            models.decode(tokens, 2, (), alone=alone)
            _, first, rest = models.decode(tokens, case.output, (), alone=alone)
            record(
                {
                    "plan": name,
                    "dtype": "bfloat16",
                    "batch": case.batch,
                    "prompt": case.prompt,
                    "ms": 1e3 * rest / (case.output - 1),
                    "first_token_seconds": first,
                    "device": models.device,
                }
            )
