"""Tiny trios on disk, made by transformers, and what plain torch loops make of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from decode import Generator, Options, Sampling, Truncation
from decode.requests import Schedule
from proxy_jax.tokenization import Prompt
from proxy_jax.trio import LoadedTrio, ModelSpec, load_trio

torch.set_num_threads(1)  # several threads are slower for models of this size

ROLES = ("base", "expert", "antiexpert")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
PAD, BOS, EOS = 0, 1, 2
TOKENS = 300
STEPS = 12
PROMPTS = (
    "The capital of France is",
    "Three models answer a question",
    "A",
    "one two three four five six seven",
    "The small model is tuned, and the large model is not; the difference tells what to say",
    "Question: how many apples are left?\nAnswer:",
    "é ü ß",
    "apples and models and",
)

Ids = Mapping[str, Sequence[int]]
Scores = np.ndarray


@functools.cache
def backend() -> str:
    """A byte-level BPE tokenizer, serialised."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(word, special=True) for word in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROMPTS * 3, trainer)
    return tokenizer.to_str()


def _unreadable() -> list[int]:
    """Special tokens and parts of characters."""
    tokenizer = Tokenizer.from_str(backend())
    texts = [tokenizer.decode([i]) for i in range(TOKENS)]
    return [
        i for i, text in enumerate(texts) if not (text.isascii() and text.isprintable() and text)
    ]


def make_tokenizer(
    *, swap: int = 0, extra: Iterable[str] = (), drop: int = 0, bos: bool = False, chat: bool = True
) -> Any:
    """A transformers tokenizer.

    Args:
      swap: this many of the last merged tokens stand in reverse order.
      extra: tokens appended.
      drop: this many of the last merged tokens are missing.
      bos: the tokenizer puts a BOS first by itself.
      chat: it has a chat template.
    """
    tokenizer = Tokenizer.from_str(backend())
    if swap or drop:
        tokenizer = _edited(tokenizer, swap, drop)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    tokenizer.add_tokens(list(extra))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def make_eos_tokenizer() -> Any:
    """A tokenizer that puts BOS before a text and EOS behind it."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert tokenizer("A")["input_ids"][-1] == EOS
    return tokenizer


def _edited(tokenizer: Tokenizer, swap: int, drop: int) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    words = words[: len(words) - drop]
    words[len(words) - swap :] = reversed(words[len(words) - swap :])
    content["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    pairs = [
        pair if isinstance(pair, list) else pair.split(" ") for pair in content["model"]["merges"]
    ]
    content["model"]["merges"] = [pair for pair in pairs if "".join(pair) in words]
    return Tokenizer.from_str(json.dumps(content))


def make_model(model_type: str, rows: int, seed: int, **fields: Any) -> Any:
    """A small random torch model whose every weight matters."""
    sizes = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    config = transformers.AutoConfig.for_model(model_type, **(sizes | fields))
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases
                weight.add_(0.2 * torch.randn_like(weight))
        head = model.get_output_embeddings().weight
        head[TOKENS:] *= 8.0  # padding would win if it could
        head[_unreadable()] *= 0.2
    return model.eval()


@dataclasses.dataclass(frozen=True)
class TinyTrio:
    """Three models on disk and in torch.

    Attributes:
      paths, models, tokenizers: by role.
      templates: by role; "raw" where absent.
    """

    paths: Mapping[str, Path]
    models: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    templates: Mapping[str, str]

    def spec(self, role: str) -> ModelSpec:
        return ModelSpec(str(self.paths[role]), "float32", self.templates.get(role, "raw"))

    def load(self, roles: Sequence[str] = ROLES, **settings: Any) -> LoadedTrio:
        members: dict[str, Any] = {role: self.spec(role) for role in roles}
        return load_trio(**members, **settings)

    @property
    def valid(self) -> np.ndarray:
        """[V] bool: the ids that the base's tokenizer has."""
        return np.arange(self.models["base"].config.vocab_size) < len(self.tokenizers["base"])

    @property
    def shared(self) -> np.ndarray:
        """[V] bool: the ids that all tokenizers give to the same token."""
        words = [tokenizer.convert_ids_to_tokens for tokenizer in self.tokenizers.values()]
        sizes = [len(tokenizer) for tokenizer in self.tokenizers.values()]
        same = np.zeros(len(self.valid), bool)
        for i in range(min(sizes)):
            same[i] = len({word(i) for word in words}) == 1
        return same

    def ids(self, prompt: str) -> dict[str, list[int]]:
        """What each role reads; for templates that are raw or a format string of {prompt}."""
        texts = {role: self.templates.get(role, "raw") for role in self.models}
        return {
            role: self.tokenizers["base"](prompt if t == "raw" else t.replace("{prompt}", prompt))[
                "input_ids"
            ]
            for role, t in texts.items()
        }

    def scores(self, role: str, ids: Sequence[int]) -> Scores:
        """A model's logits after these ids, [rows of that model]."""
        with torch.inference_mode():
            return self.models[role](torch.tensor([list(ids)])).logits[0, -1].numpy()

    def greedy(
        self,
        ids: Ids,
        steps: int,
        combine: Callable[[Mapping[str, Scores], int], Scores] | None = None,
        change: Callable[[list[int], Scores], Scores] = lambda context, scores: scores,
        eos: Sequence[int] = (EOS,),
    ) -> list[int]:
        """The slow, obvious loop: every context is read anew at each step.

        Args:
          ids: prompts by role.
          steps: most new tokens.
          combine: (scores by role, cut or filled to M's size; step) -> scores; by default s_M +
            s_+ - s_-.
          change: (M's context, scores) -> scores: what processors do.
          eos: ids that end the text.
        """
        combine = combine or self.shifted(1.0)
        new: list[int] = []
        while len(new) < steps and not (new and new[-1] in eos):
            scores = {role: self.fitted(role, [*ids[role], *new]) for role in ids}
            combined = change([*ids["base"], *new], combine(scores, len(new)))
            new.append(int(np.argmax(np.where(self.valid, combined, -np.inf))))
        return new

    def fitted(self, role: str, ids: Sequence[int]) -> Scores:
        """A model's logits as a vector of M's size: zeros where it has no row."""
        scores = self.scores(role, ids)
        fitted = np.zeros(len(self.valid), np.float32)
        fitted[: len(scores)] = scores[: len(fitted)]
        return fitted

    def shifted(
        self, alpha: float | Callable[[int], float]
    ) -> Callable[[Mapping[str, Scores], int], Scores]:
        """s_M + alpha (s_+ - s_-) on shared ids, s_M elsewhere."""
        at = alpha if callable(alpha) else lambda step: alpha
        return lambda s, step: np.where(
            self.shared, s["base"] + at(step) * (s["expert"] - s["antiexpert"]), s["base"]
        )


def write_trio(
    directory: Path,
    members: Mapping[str, Any],
    tokenizers: Mapping[str, Any] | None = None,
    templates: Mapping[str, str] | None = None,
) -> TinyTrio:
    """Saves models, each with a tokenizer, as transformers does."""
    given = {role: (tokenizers or {}).get(role) or make_tokenizer() for role in members}
    paths = {role: directory / role for role in members}
    for role, model in members.items():
        model.save_pretrained(paths[role])
        given[role].save_pretrained(paths[role])
    return TinyTrio(paths, members, given, templates or {})


def warp(change: Any, scores: Scores, context: Sequence[int] = ()) -> Scores:
    """What a logits processor or warper of transformers makes of one row of scores."""
    return change(torch.tensor([list(context)]), torch.tensor(scores)[None])[0].numpy()


def llama_trio(directory: Path) -> TinyTrio:
    """M is wider and deeper; M+ and M- have one shape and more rows; M+ reads its own prompt."""
    return write_trio(
        directory,
        {
            "base": make_model("llama", 320, 0, hidden_size=48, num_hidden_layers=2),
            "expert": make_model("llama", 328, 1, num_hidden_layers=1),
            "antiexpert": make_model("llama", 328, 2, num_hidden_layers=1),
        },
        templates={"expert": "[INST] {prompt} [/INST]"},
    )


def mixed_trio(directory: Path) -> TinyTrio:
    """Three families; M+ has fewer rows than M, and some of its tokens stand elsewhere."""
    return write_trio(
        directory,
        {
            "base": make_model("mistral", 320, 3, sliding_window=9, num_key_value_heads=4),
            "expert": make_model(
                "qwen2",
                304,
                4,
                num_hidden_layers=1,
                tie_word_embeddings=True,
                initializer_range=0.5,
            ),
            "antiexpert": make_model("olmo2", 312, 5, num_hidden_layers=1),
        },
        tokenizers={"expert": make_tokenizer(swap=28), "antiexpert": make_tokenizer(drop=3)},
        templates={"expert": "Answer this: {prompt} ->"},
    )


def sampling(temperature: float, **truncation: float) -> Sampling:
    return Sampling(temperature, Truncation(**truncation))


def options(**fields: Any) -> Options:
    """Few shapes for all tests, so that few programs are compiled."""
    return Options(**({"batch_size": 4, "max_new_tokens": STEPS, "chunk_steps": 4} | fields))


def complete(
    loaded: LoadedTrio,
    prompts: Sequence[str | Prompt] = PROMPTS,
    alphas: Sequence[float | Schedule] | None = None,
    **fields: Any,
) -> list[list[int]]:
    """New tokens of each prompt as the Generator draws them."""
    completions = Generator(loaded, options(**fields)).generate(prompts, alphas)
    return [list(completion.token_ids) for completion in completions]
