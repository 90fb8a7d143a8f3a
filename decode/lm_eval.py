"""Runs any task of lm-evaluation-harness on a trio.

    python -m decode.lm_eval --model proxy_jax --tasks arc_easy,gsm8k --output_path runs/arc \\
        --model_args config=configs/smollm2_1_7b.py,alpha=0.7

The command line is lm_eval's own, with one more model. Its arguments: `config`, a config file;
`base`, `expert` and `antiexpert`, short for base.path and so on; `dtype`, short for that of all
three; `max_length`; and any field of the config by its dotted name (expert.template=chat,
mesh.tensor=8). In Python: import this module, then lm_eval.simple_evaluate("proxy_jax", ...).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import runpy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once
from ml_collections import ConfigDict
from tqdm import tqdm

from configs.defaults import decoding
from decode import job
from decode.requests import Options, Request, as_schedule
from decode.sampling import Sampling, Truncation
from decode.scheduler import Generator, longest_contexts
from decode.score import Passage, Scorer
from proxy_jax.errors import InputError
from proxy_jax.jobs import launch
from proxy_jax.jobs.exits import one_line_errors
from proxy_jax.reading import Fields, reading, shown
from proxy_jax.templates import render_chat
from proxy_jax.tokenization import Prompt, encode
from proxy_jax.trio import ROLES, Role

_GENERATION = (
    "until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty",
)  # fmt: skip
# Settings of transformers and vLLM that are not supported, and the values that change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "n": (1,),
    "best_of": (1,),
    "diversity_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "ignore_eos": (False,),
    "use_cache": (True, False),
    "skip_special_tokens": (True,),
}
_OF_BEAMS = ("length_penalty", "early_stopping")  # any value does nothing where there is one beam
_log = logging.getLogger(__name__)
_Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("proxy_jax")
class ProxyLM(TemplateLM):
    """A trio as a model of lm-evaluation-harness.

    Texts are tokenised as its Hugging Face model does it, with M's tokenizer. A role whose
    template is not "raw" reads each request's context through the template; if the context ends
    with the config's response_prefix, the answer begins with it. Contexts that are too long are
    cut on the left. Texts that come without a context (perplexity) are read without a template.

    Args:
      config: path of a config file; without one, configs/defaults.py.
      batch_size: as given to lm_eval; its default of 1, "auto" and None leave the config's.
      max_length: longest context and continuation; by default what all models have room for.
      device, max_batch_size: lm_eval's; without effect.
      fields: of the config, by their dotted names; see the module.

    Raises:
      InputError: a field that is unknown, or a trio that cannot be loaded or does not fit.
    """

    def __init__(
        self,
        config: str = "",
        batch_size: int | str | None = None,
        max_length: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **fields: Any,
    ):
        super().__init__()
        if batch_size not in (None, "auto", 1, "1"):
            with reading(f"batch_size {shown(batch_size)}", "not a number"):
                fields["batch_size"] = int(batch_size)
        self.config = read_config(config, fields)
        self._job = job.open_job(self.config)
        trio, self.options = self._job.trio, self._job.options
        self.trio, self.tokenizer = trio, trio.tokenizer
        room = min(member.config.max_positions for member in trio.members.values())
        arguments = Fields("model_args", {"max_length": max_length})
        self.max_length = min(room, arguments.integer("max_length", 2, default=room))
        # Weights, and the shortest of caches: what tasks ask for is known when they ask.
        self._job.estimate(dict.fromkeys(trio.roles, 1), 0).check()
        self.loaded = self._job.load()
        self.scorer = Scorer(
            self.loaded,
            [self.options.alpha],
            beta=self.options.beta,
            base_filter=self.options.base_filter,
            batch_size=self.options.batch_size,
        )

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Identifies the prompts that lm_eval caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation by M's chat template.

        One that refuses it is asked again without the system prompt, as lm_eval's own models do.

        Raises:
          InputError: a role has a template of its own, which would wrap the whole conversation; or
            the template cannot render it, or there is none.
        """
        own = [role for role, m in self.trio.members.items() if m.template.spec != "raw"]
        if own:
            raise InputError(
                f"--apply_chat_template: {own[0]} has a template in the config; use one of the two"
            )

        def rendered(history: list[dict[str, str]]) -> str:
            return render_chat(
                self.tokenizer,
                history,
                "base",
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return rendered(chat_history)
        except InputError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            text = rendered(rest)
            warning_once(_log, "the chat template refuses system prompts: they are left out")
            return text

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside its results: the resolved config."""
        return {"proxy_jax": self.config.to_dict()}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Gives the ids of a text, never with an EOS that it does not spell out.

        Without a flag, the tokenizer's BOS is not doubled.
        """
        if add_special_tokens is None:
            begin = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not string.startswith(begin)
        return encode(self.tokenizer, string, special=add_special_tokens)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows of max_length."""
        windows: list[_Encoded] = []
        sources = []
        for index, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                sources.append(index)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for index, (log_prob, _) in zip(sources, found, strict=True):
            totals[index] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completes contexts, each cut at its own stop strings.

        Raises:
          InputError: a setting that is not supported, or texts that there is no memory for; before
            anything is generated.
        """
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for index, request in enumerate(requests):
            with reading("generation_kwargs", "not JSON"):
                groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        asked = []
        for members in groups.values():
            options, until = self._generation(requests[members[0]].args[1])
            todo = [self._request(i, requests[i].args[0], options.max_new_tokens) for i in members]
            self._job.estimate(longest_contexts(todo), options.max_new_tokens).check()
            asked.append((options, until, todo))
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for options, until, todo in asked:
                generator = Generator(self.loaded, options)
                for done in generator.stream(todo, longest_contexts(todo)):
                    for completion in done:
                        ids = completion.token_ids
                        ids = ids[:-1] if completion.finish_reason == "eos" else ids
                        text = self.tokenizer.decode(ids, skip_special_tokens=True)
                        text = postprocess_generated_text(text, until, None)
                        texts[completion.row] = text
                        given = requests[completion.row].args
                        self.cache_hook.add_partial("generate_until", given, text)
                    bar.update(len(done))
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[_Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        passages = []
        for texts, context, continuation in requests:
            # All but the last token of the continuation are read.
            contexts = self._contexts(texts[0] if texts else "", context, len(continuation) - 1)
            passages.append(Passage(contexts, continuation))
        answers = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for index, score in self.scorer.stream(passages):
                answers[index] = float(score.totals[0]), bool(score.all_greedy[0])
                texts = requests[index][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                bar.update()
        return answers

    def _contexts(self, text: str, ids: list[int], more: int) -> dict[Role, list[int]]:
        """What each role reads as context: ids, or the text as its template renders it.

        Cut on the left so that `more` tokens have room behind.
        """
        text, prefix = text.rstrip(), self.config.response_prefix
        if not text.endswith(prefix):
            prefix = ""
        prompt = Prompt(text.removesuffix(prefix), self.config.system_prompt, prefix)
        room = max(1, self.max_length - more)
        contexts = {}
        for role, member in self.trio.members.items():
            read = ids
            if text and member.template.spec != "raw":
                read = member.template.encode(prompt, self.tokenizer, member.tokenizer, role)
            if len(read) > room:
                _log.warning("%s: %d tokens of context are cut to %d", role, len(read), room)
            contexts[role] = read[-room:]
        return contexts

    def _request(self, row: int, text: str, new_tokens: int) -> Request:
        ids = self.tok_encode(text) or [self.prefix_token_id]
        contexts = self._contexts(text, ids, new_tokens)
        return Request(row, contexts, as_schedule(self.options.alpha), new_tokens)

    def _generation(self, settings: Mapping[str, Any]) -> tuple[Options, list[str]]:
        """A task's generation_kwargs as options, and its stop strings.

        Raises:
          InputError: a setting that is not supported or out of range, or no room for a context.
        """
        with reading("generation_kwargs", "cannot be understood"):
            asked = {name: value for name, value in settings.items() if value is not None}
            given = dict(normalize_gen_kwargs(asked, self.config.max_new_tokens))
        _check_supported(given)
        if given["max_gen_toks"] >= self.max_length:
            raise InputError(
                f"generation_kwargs: max_gen_toks of {given['max_gen_toks']} leaves no room for a "
                f"context in max_length of {self.max_length}"
            )
        fields = Fields("generation_kwargs", given)
        until = [text for text in fields.array("until", str) if text]
        # A special token is not in the text that stop strings are sought in; its id ends it.
        alone = [self.tok_encode(text, add_special_tokens=False) for text in until]
        hidden = [ids for ids in alone if not self.tokenizer.decode(ids, skip_special_tokens=True)]
        special = {ids[0] for ids in hidden if len(ids) == 1}
        ends = self.trio.eos_ids() if self.options.eos_ids is None else self.options.eos_ids
        sampling = Sampling()
        if fields.flag("do_sample"):
            truncation = {name: given.get(name) for name in ("top_k", "top_p", "min_p")}
            sampling = Sampling(given.get("temperature"), Truncation(**truncation))
        try:
            options = dataclasses.replace(
                self.options,
                max_new_tokens=given["max_gen_toks"],
                sampling=sampling,
                stop=tuple(until),
                repetition_penalty=given.get("repetition_penalty", self.options.repetition_penalty),
                eos_ids=tuple(sorted({*ends, *special})),
            )
        except InputError as error:
            raise InputError(f"generation_kwargs: {error}") from error
        return options, until


def _check_supported(settings: Mapping[str, Any]) -> None:
    """Refuses settings that are unknown, or would have an effect that there is no support for.

    Raises:
      InputError: names the setting and its value.
    """
    for name in sorted(settings.keys() - {*_GENERATION, *_OF_BEAMS}):
        without_effect = _WITHOUT_EFFECT.get(name)
        if without_effect is None:
            raise InputError(
                f"generation_kwargs: {name}={shown(settings[name])} is not supported; settings are "
                f"{', '.join(_GENERATION)}"
            )
        if settings[name] not in without_effect:
            raise InputError(
                f"generation_kwargs: {name}={shown(settings[name])} is not supported, only "
                f"{' or '.join(map(str, without_effect))}, without effect"
            )


def read_config(path: str, fields: Mapping[str, Any]) -> ConfigDict:
    """A config file, or the defaults, with fields set as on a command line.

    Args:
      path: of a Python file with get_config(); may be empty.
      fields: by dotted name; "base" is short for "base.path" (and so on), "dtype" for the dtypes
        of all roles.

    Raises:
      InputError: a file that cannot be run, an unknown field, or a value of another type.
    """
    with reading(f"config {path}", "cannot be run"):
        config = runpy.run_path(path)["get_config"]() if path else decoding()
    for name, value in fields.items():
        names: Iterable[str] = (name,)
        if name in ROLES:
            names = (f"{name}.path",)
        elif name == "dtype":
            names = (f"{role}.dtype" for role in ROLES)
        for full in names:
            try:
                config.update_from_flattened_dict({full: value})
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"model_args: {name}={value!r}: {error}") from error
    return config


def main() -> None:
    """lm_eval's command line. Bad input ends it in one line, with status 2."""
    launch.use_compilation_cache()
    with one_line_errors():
        cli_evaluate()


if __name__ == "__main__":
    main()
