"""Every field of a training config, with its default. Configs start here and set what differs."""

from ml_collections import ConfigDict


def sft() -> ConfigDict:
    """What train.sft reads; an unknown field is an error."""
    config = ConfigDict()

    # The model to tune, M-: a Hugging Face directory, GGUF file, or hub id.
    config.base = ""
    # Or no model but an architecture, as config.json states it ("model_type", "hidden_size", ...),
    # to train from random weights, with the tokenizer of a directory or hub id.
    config.architecture = ConfigDict()
    config.tokenizer = ""

    # The data: a JSONL, JSON or CSV file, or a hub data set. format: prompt_completion, messages or
    # text.
    config.data = ConfigDict(
        {
            "path": "",
            "subset": "",
            "split": "train",
            "format": "prompt_completion",
            "limit": 0,
            "skip_invalid": False,  # leaves out and counts rows that cannot be learnt from
            "chat_template": "",  # Jinja, for messages and a tokenizer that has no template
        }
    )
    config.held_out = 0  # rows at the end that are measured on, never trained on
    config.max_length = 2048  # tokens of an example and of a row
    config.packing = True  # several examples share a row; they do not see each other

    # LoRA on these linear layers; rank 0 trains all parameters.
    config.lora = ConfigDict(
        {
            "rank": 0,
            "alpha": 16.0,
            "dropout": 0.0,
            "modules": (
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ),
        }
    )

    # Consistent proxy tuning (He et al. 2024): the loss is that of the logits
    # s + alpha_train (s_base - s_-), with s_- those of the model before tuning. 0 is plain tuning.
    config.consistent = ConfigDict({"alpha_train": 0.0, "base": ""})

    # AdamW, see train/optimizer.py.
    config.optimizer = ConfigDict(
        {
            "learning_rate": 2e-5,
            "schedule": "linear",
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
        }
    )
    config.epochs = 2
    config.batch_size = 128  # rows of a step
    config.accumulate = 1  # micro-batches they are cut into
    # Of the passes: float32, bfloat16 or float16; what is trained stays float32.
    config.compute_dtype = "bfloat16"
    config.remat = "none"  # what the backward pass computes again: none, dots, full
    config.seed = 0

    # The run.
    config.log_every = 1
    config.eval_every = 0  # steps between two measurements on the held-out rows; 0 is at the end
    config.checkpoint_every = 100
    config.keep = 2
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})  # one may be -1
    config.replicate = ()  # logical axes not to split
    config.layers = "auto"  # scanned on TPU and GPU, unrolled on CPU; or say which
    config.distributed = False  # one of several processes, all started alike: README, Many hosts

    # What train.benchmark measures: so many steps, the compiled step's memory under each of these
    # remat policies, and ranks in place of lora.rank (0 is full fine-tuning). base may name one of
    # architectures.py, for random weights, and data.path be empty, for rows of random tokens.
    # compare: "torch" for transformers' Trainer (with peft) beside it.
    config.benchmark = ConfigDict(
        {"steps": 5, "remat": ("none", "dots", "full"), "ranks": (), "compare": ""}
    )

    # train.compile_check: a TPU slice ("v5e:4x4") that need not be there.
    config.topology = ""

    # The output: checkpoints, metrics.jsonl, loss.png, and the expert as a Hugging Face directory.
    config.output_dir = ""
    config.export_dtype = "bfloat16"  # or float32, float16
    return config.lock()
