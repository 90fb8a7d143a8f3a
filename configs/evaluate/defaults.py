"""Every field of an evaluation, with its default. Configs start here and set what differs."""

from ml_collections import ConfigDict

# Fields of a decoding config that hold here as they do there; the tasks set the others.
_DECODING = (
    "base", "expert", "antiexpert", "plan", "alpha", "alpha_schedule", "beta", "base_filter",
    "seed", "eos_ids", "batch_size", "chunk_steps", "mesh", "replicate", "layers", "distributed",
)  # fmt: skip


def evaluation(trio: ConfigDict, *tasks: str) -> ConfigDict:
    """What decode.evaluate reads; an unknown field is an error.

    Args:
      trio: a decoding config (configs/defaults.py).
      tasks: names, those of decode.tasks.TASKS.
    """
    fields = trio.to_dict()
    config = ConfigDict({name: fields[name] for name in _DECODING})

    # The large model tuned directly, the ceiling: a path, or an adapter on M; with neither it is
    # left out. A model's template may also be "task": a chat model, which each task prompts in its
    # own way. A model that is not "raw" reads, alone, the prompt that a task has for chat models.
    config.tuned = ConfigDict(
        {"path": "", "template": "raw", "adapter": ""}
        | {name: fields["base"][name] for name in ("dtype", "quantize")}
    )

    # data: the official file (for ToxiGen its directory), the hub id of a copy, or empty for the
    # hub's own. form: "published", the prompts of the paper's code, or "clean". limit: the first
    # examples only. max_new_tokens, samples: 0 for the task's own. letters: a multiple-choice
    # question is answered by the likeliest letter, not by a text. judge: "module:function", see
    # decode/tasks/judges.py.
    config.tasks = ConfigDict(
        {
            name: {
                "data": "",
                "form": "published",
                "limit": 0,
                "max_new_tokens": 0,
                "samples": 0,
                "letters": False,
                "judge": "",
            }
            for name in tasks
        }
    )
    # Coefficients to compare on the first examples of each task; limit 0 is all of them.
    config.sweep = ConfigDict({"alphas": (), "limit": 0})

    config.output_dir = ""
    config.overwrite = False  # replaces the output of another evaluation; the same one goes on
    return config.lock()
