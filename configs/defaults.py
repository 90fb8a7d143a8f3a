"""Every field of a decoding config, with its default. Configs start here and set what differs."""

from ml_collections import ConfigDict


def decoding() -> ConfigDict:
    """What decode.check and decode.generate read; an unknown field is an error."""
    config = ConfigDict()

    # The three models. path: Hugging Face directory, GGUF file, hub id, or the output_dir of a
    # training run, for its latest checkpoint (OUTPUT_DIR/checkpoints/STEP for another); empty
    # leaves the role out. template: how the role is prompted: "raw", "chat" (the chat template of
    # its tokenizer), "reference" (what the published code feeds Llama-2-chat), or a format string
    # with {prompt} and optionally {system} and {response_prefix}. adapter: LoRA on the model, a
    # PEFT directory or a LoRA run; such a run as path is its base with the adapter. quantize:
    # "int8" stores the large weights in 8 bits; dtype is then that of the rest and of activations.
    for role in ("base", "expert", "antiexpert"):
        config[role] = ConfigDict(
            {"path": "", "dtype": "bfloat16", "template": "raw", "adapter": "", "quantize": ""}
        )
    config.method = "proxy"  # proxy, or one model alone: base, expert, antiexpert
    # separate; stacked: M+ and M- of one shape in one pass; shared: M+ is M- with an adapter (or
    # only another template), and the weights are read once for both.
    config.plan = "separate"

    # s = s_M + alpha (s_+ - s_-), plus (beta - 1) (s_M - s_-).
    config.alpha = 1.0
    config.alpha_schedule = ()  # instead: ((first step, alpha), ...)
    config.alpha_field = ""  # instead: a field of each row, a number or such a schedule
    config.beta = 1.0
    config.base_filter = ConfigDict({"top_p": 1.0, "min_p": 0.0})  # of M, before the shift

    # The prompts, one JSON object a line: a field, or a template over fields ("{question} ...").
    config.prompts = ConfigDict(
        {"path": "", "field": "prompt", "template": "", "id_field": "", "limit": 0}
    )
    config.system_prompt = ""
    config.response_prefix = ""  # how the answer begins, in every role's context

    # Decoding. temperature 0 is greedy; top_k 0 or -1, top_p 1 and min_p 0 are no truncation.
    config.sampling = ConfigDict({"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
    config.max_new_tokens = 256
    # No end of text before: neither EOS, nor a stop string that begins in the text of these tokens.
    config.min_new_tokens = 0
    config.samples = 1
    config.seed = 0  # from 0 to 2^32 - 1
    config.stop = ()  # strings that end a text
    # Strings that no text contains, in whatever tokens they are spelled; nor may the text complete
    # one that the prompt begins. And strings that no text begins with.
    config.banned = ()
    config.banned_first = ()
    # As the published code bans: only the tokens that the tokenizer makes of the string alone may
    # not be generated in sequence, and only the first of them not come first. Other spellings of
    # the same string (after a space, across words) are let through.
    config.banned_tokens = ()
    config.banned_first_tokens = ()
    config.repetition_penalty = 1.0
    config.eos_ids = ()  # by default those of the models

    # The run.
    config.batch_size = 8
    config.chunk_steps = 16  # steps between two looks of the host
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})  # one may be -1: all devices left
    config.replicate = ()  # logical axes not to split: "kv_heads", "vocab", ...
    config.layers = "auto"  # scanned on TPU and GPU, unrolled on CPU; or say which
    config.distributed = False  # one of several processes, all started alike: README, Many hosts

    # decode.compile_check: a TPU slice ("v5e:4x4") that need not be there, and slots a row.
    config.topology = ""
    config.context = 4096

    # The output.
    config.output_dir = ""
    config.save_token_ids = False
    # Record what each model thought of every token, and explain it: explanation.json, tokens.html.
    config.trace = False
    config.overwrite = False  # replaces the output of another job; the same job goes on

    # decode.benchmark: M alone and the trio under each plan and dtype, each of these batches,
    # prompts and outputs. A path above may name one of architectures.py: then all models have
    # random weights, and expert.adapter is a rank ("rank=16"). dtypes: "float32", "bfloat16",
    # "float16", or "int8", for 8-bit weights with the rest as the models' dtype says; empty for
    # what the models say. plans: empty for the plan above. compare: "torch", the same trio in a
    # loop over transformers' models.
    config.benchmark = ConfigDict(
        {
            "batch_sizes": (1, 8, 32),
            "prompt_lengths": (8,),
            "output_lengths": (48,),
            "plans": (),
            "dtypes": (),
            "repeats": 5,
            "compare": "",
        }
    )
    return config.lock()
