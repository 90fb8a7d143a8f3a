"""What the stages run: the models of a full check, and tiny ones to rehearse it."""

from __future__ import annotations

import dataclasses

from configs.architectures import ARCHITECTURES
from decode.timing import Case
from proxy_jax.trio import ModelSpec, Plan, Role, Trio, describe_trio

RANK = 16  # of the adapter that is M+ under plan "shared"
Kind = tuple[Plan, str]  # a plan, and "float32", "bfloat16", or "int8" beside bfloat16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The models and batches of a check.

    Attributes:
      base, expert, antiexpert: names of architectures.
      batches: rows that decode together.
      prompts: tokens of a prompt, the short and the long one.
      new_tokens: of each row.
      chunk_steps: steps between two looks of the host.
      prefill: the batch whose prefill is timed.
      trained: architectures to train, the first that fits is.
      rows, length: of a training step's batch.
      repeats: measured runs.
      compared: plans and dtypes whose steps are compared with the CPU's, by worth.
      timed: plans and dtypes whose steps are timed, by worth; each draws its weights.
    """

    base: str
    expert: str
    antiexpert: str
    batches: tuple[int, ...]
    prompts: tuple[int, int]
    new_tokens: int
    chunk_steps: int
    prefill: Case
    trained: tuple[str, ...]
    rows: int
    length: int
    repeats: int
    compared: tuple[Kind, ...]
    timed: tuple[Kind, ...]

    @property
    def middle(self) -> int:
        """A batch that is neither the smallest nor the largest, where there are three."""
        return self.batches[len(self.batches) // 2]

    def trio(self, kind: Kind) -> Trio:
        """The trio; M+ is a whole model, or under plan "shared" an adapter on M-."""
        plan, kind_of_weights = kind
        quantize = "int8" if kind_of_weights == "int8" else ""
        dtype = "bfloat16" if quantize else kind_of_weights
        adapter = plan == "shared"
        expert = self.antiexpert if adapter else self.expert
        paths: dict[Role, str] = {
            "base": self.base,
            "expert": expert,
            "antiexpert": self.antiexpert,
        }
        specs = {role: ModelSpec(path, dtype, quantize=quantize) for role, path in paths.items()}
        if adapter:
            specs["expert"] = dataclasses.replace(specs["expert"], adapter=f"rank={RANK}")
        return describe_trio(specs, ARCHITECTURES)


SIZES = {
    "full": Sizes(
        base="meta-llama/Llama-2-13b-hf",
        expert="meta-llama/Llama-2-7b-chat-hf",
        antiexpert="meta-llama/Llama-2-7b-hf",
        batches=(1, 8, 64),
        prompts=(128, 2048),
        new_tokens=64,
        chunk_steps=16,
        prefill=Case(8, 2048, 2),
        trained=(
            "meta-llama/Llama-2-7b-hf",
            "HuggingFaceTB/SmolLM2-1.7B",
            "Qwen/Qwen2.5-0.5B",
        ),
        rows=4,
        length=2048,
        repeats=3,
        compared=(
            ("separate", "float32"),
            ("stacked", "float32"),
            ("shared", "float32"),
            ("separate", "bfloat16"),
            ("shared", "bfloat16"),
            ("stacked", "bfloat16"),
            ("separate", "int8"),
            ("shared", "int8"),
            ("stacked", "int8"),
        ),
        timed=(
            ("separate", "bfloat16"),
            ("shared", "bfloat16"),
            ("separate", "int8"),
            ("shared", "int8"),
        ),
    ),
    "tiny": Sizes(
        base="tiny",
        expert="tiny",
        antiexpert="tiny",
        batches=(2,),
        prompts=(8, 40),
        new_tokens=8,
        chunk_steps=4,
        prefill=Case(2, 40, 2),
        trained=("tiny",),
        rows=2,
        length=32,
        repeats=1,
        compared=(("separate", "float32"), ("shared", "bfloat16"), ("stacked", "int8")),
        timed=(("separate", "bfloat16"), ("shared", "int8")),
    ),
}
