"""Keeps the engine's slots full: the host side of decoding, and the Python API.

loaded = load_trio("M", expert="M+", antiexpert="M-")
for completion in Generator(loaded, Options(alpha=1.0)).generate(["The capital of France is"]):
    print(completion.text)
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode import engine
from decode.bans import string_bans
from decode.layouts import bind
from decode.processors import make_processors
from decode.requests import (
    Completion,
    FinishReason,
    Options,
    Request,
    Schedule,
    as_schedule,
    check_unicode,
)
from decode.state import DecodeState, Rows
from decode.text import Detokenizer
from decode.trace import Trace, joined, of_slot
from proxy_jax.errors import InputError
from proxy_jax.reading import shown
from proxy_jax.sharding import Placement
from proxy_jax.tokenization import Prompt
from proxy_jax.trio import LoadedTrio, Pass, Trio

_SHORTEST_BUCKET = 8
_COPIED_ROWS = 8  # at once; a copy holds so many rows of a cache a second time
_MOST_REQUESTS = 2**22  # of a job: each is an object on the host
_CACHE_GRAIN = 128  # cache lengths are multiples of it, so that few programs are compiled


class Generator:
    """Decodes prompts with a loaded trio.

    Attributes:
      new_tokens: drawn so far, those of unfinished rows included.
      bans: of the strings that no text may contain, or begin with.

    Args:
      loaded: the trio's weights.
      options: how to decode.

    Raises:
      InputError: a batch that the mesh does not divide, or options the tokenizer cannot serve.
    """

    def __init__(self, loaded: LoadedTrio, options: Options):
        self.loaded = loaded
        self.options = options
        self.program = engine.Program.of(loaded, trace=options.trace)
        self.new_tokens = 0
        self._bound_to: tuple[tuple[int, ...], int] | None = None
        loaded.place.check_divides("batch", options.batch_size, "batch_size")
        trio = loaded.trio
        _check_ids(trio, options)
        self.bans = string_bans(
            trio.tokenizer, trio.vocabulary.size, options.banned, options.banned_first
        )
        self.eos = tuple(trio.eos_ids() if options.eos_ids is None else options.eos_ids)
        self.settings = engine.Settings(
            sampling=options.sampling,
            processors=make_processors(
                self.eos,
                [jax.device_put(ban.table(), loaded.place.sharding(())) for ban in self.bans],
                [_ids(trio, text) for text in options.banned_tokens],
                [_ids(trio, text)[0] for text in options.banned_first_tokens],
                options.min_new_tokens,
                options.repetition_penalty,
            ),
            base_filter=options.base_filter,
            beta=None if options.beta == 1.0 else jnp.float32(options.beta),
            key=jax.random.key(options.seed),
            shared=trio.vocabulary.shared,  # type: ignore[arg-type]
            valid=trio.vocabulary.valid,  # type: ignore[arg-type]
        )

    def generate(
        self, prompts: Sequence[str | Prompt], alpha: Sequence[float | Schedule] | None = None
    ) -> list[Completion]:
        """Completes prompts; `options.samples` completions of each, in order.

        Args:
          prompts: texts, or Prompts with a system prompt and response prefix.
          alpha: one coefficient or schedule a prompt, instead of the options'.

        Raises:
          InputError: a prompt that is empty or too long, or a string without effect.
        """
        requests = make_requests(self.loaded.trio, self.options, prompts, alpha)
        chunks = self.stream(requests, longest_contexts(requests))
        return sorted(itertools.chain.from_iterable(chunks), key=lambda done: done.row)

    def stream(
        self, requests: Sequence[Request], contexts: Mapping[str, int]
    ) -> Iterator[list[Completion]]:
        """Yields the rows that finish, chunk by chunk; their slots go to waiting requests.

        Args:
          requests: what to make.
          contexts: by role, the longest context of the whole job; `longest_contexts`. A resumed
            job passes the same as the first time, and so runs the same programs.

        Raises:
          InputError: a model's logits became NaN or infinite.
        """
        if not requests:
            return
        queue = collections.deque(requests)
        pieces = max((len(request.alpha) for request in requests), default=1)
        batch = self.options.batch_size
        slots: list[_Slot | None] = [None] * batch
        state = self.new_state(contexts, pieces)
        while queue or any(slots):
            free = [i for i, slot in enumerate(slots) if slot is None]
            arrivals = {i: queue.popleft() for i in free[: len(queue)]}
            if arrivals:
                running = {i: slot.request for i, slot in enumerate(slots) if slot is not None}
                state = self.admit(state, arrivals, running, pieces)
                for i, request in arrivals.items():
                    prompt = request.ids["base"]
                    slots[i] = _Slot(request, Detokenizer(self.loaded.trio.tokenizer, prompt))
            state, seen = self.chunk(state)
            seen = jax.device_get(seen)
            finished = self._advance(slots, seen)
            # A row that met a stop string is still active on the device.
            halted = [i for i in finished if seen["active"][i]]
            if halted:
                state = self._set_rows(state, dict.fromkeys(halted), pieces)
            yield list(finished.values())
            self._refuse_broken(slots, seen)

    def chunk(self, state: DecodeState) -> tuple[DecodeState, dict[str, Any]]:
        """Decodes a chunk; see engine.chunk. The state, of `new_state`, is donated."""
        return self._engine.chunk(state)

    def _advance(self, slots: list[_Slot | None], seen: Mapping[str, Any]) -> dict[int, Completion]:
        """Hands a chunk's tokens to their slots, and empties those that are done."""
        finished = {}
        for i, slot in enumerate(slots):
            if slot is None or seen["broken"][i].any():
                continue
            drawn = seen["tokens"][i] >= 0
            new = seen["tokens"][i][drawn].tolist()
            slot.ids += new
            if self.options.trace:
                slot.traces.append(of_slot(seen["trace"], i, drawn))
            self.new_tokens += len(new)
            completion = self._finished(slot, active=bool(seen["active"][i]))
            if completion is not None:
                finished[i] = completion
                slots[i] = None
        return finished

    def _refuse_broken(self, slots: Sequence[_Slot | None], seen: Mapping[str, np.ndarray]) -> None:
        roles = self.program.roles
        for slot, broken in zip(slots, seen["broken"], strict=True):
            if slot is not None and broken.any():
                reasons = [
                    *(f"the logits of the {role} model became NaN or infinite" for role in roles),
                    "bans and base_filter exclude every token, or alpha and beta overflow",
                ]
                raise InputError(f"row {slot.request.row}: {reasons[int(np.argmax(broken))]}")

    def _finished(self, slot: _Slot, *, active: bool) -> Completion | None:
        ids = slot.ids
        options = self.options
        stop = slot.detokenizer.find_stop(ids, options.stop, options.min_new_tokens)
        reason: FinishReason
        if stop is not None:
            count, text = stop
            reason, ids = "stop", ids[:count]
        elif active:
            return None
        else:
            reason = "eos" if ids[-1] in self.eos else "length"
            text = slot.detokenizer.text(ids[:-1] if reason == "eos" else ids)
        prompts = slot.request.ids
        return Completion(
            row=slot.request.row,
            text=text,
            token_ids=tuple(ids),
            finish_reason=reason,
            prompt_tokens={role: len(prompt) for role, prompt in prompts.items()},
            trace=joined(slot.traces, len(ids)) if options.trace else None,
        )

    def new_state(self, contexts: Mapping[str, int], pieces: int = 1) -> DecodeState:
        """An empty batch.

        Args:
          contexts: by role, the longest context of the job.
          pieces: the most pieces of an alpha schedule.
        """
        sizes, idle = self.batch_shape(contexts, pieces)
        if self._bound_to != (sizes, pieces):
            self._engine = bind(
                self.program, self.loaded, self.settings, sizes, self.options.batch_size, idle,
                self.options.chunk_steps,
            )  # fmt: skip
            self._bound_to = sizes, pieces
        return self._engine.new_state(idle)

    def batch_shape(
        self, contexts: Mapping[str, int], pieces: int = 1
    ) -> tuple[tuple[int, ...], Rows]:
        """Cache slots a row of each pass, and an idle row; arguments as in `new_state`."""
        sizes = tuple(cache_slots(one, contexts) for one in self.program.passes)
        return sizes, self._rows([None], pieces)

    def admit(
        self,
        state: DecodeState,
        arrivals: Mapping[int, Request],
        running: Mapping[int, Request],
        pieces: int = 1,
    ) -> DecodeState:
        """Prefills requests into free slots.

        Args:
          state: the batch; its arrays are donated.
          arrivals: by slot.
          running: those under way, by slot.
          pieces: as in `new_state`.
        """
        # The samples of a prompt have one ids: it is prefilled for the first of them, and copied.
        holders = {id(request.ids): i for i, request in running.items()}
        new, copies = {}, {}
        for i, request in arrivals.items():
            source = holders.setdefault(id(request.ids), i)
            if source == i:
                new[i] = request
            else:
                copies[i] = source
        caches = list(state.caches)
        for index, one in enumerate(self.program.passes):
            slots_a_row = jax.tree.leaves(caches[index].keys)[0].shape[-2]
            for length, group in self._groups(one.roles, new, slots_a_row):
                tokens = np.zeros((len(one.roles), len(group), length), np.int32)
                lengths = np.zeros((len(one.roles), len(group)), np.int32)
                slots = np.full(len(group), self.options.batch_size, np.int32)
                for p, slot in enumerate(group):
                    if slot is None:
                        continue
                    slots[p] = slot
                    for r, role in enumerate(one.roles):
                        prompt = arrivals[slot].ids[role][:-1]
                        tokens[r, p, : len(prompt)] = prompt
                        lengths[r, p] = len(prompt)
                caches[index] = self._engine.prefill(index, caches[index], tokens, lengths, slots)
            for first in range(0, len(copies), _COPIED_ROWS):
                targets = list(copies)[first : first + _COPIED_ROWS]
                sources = np.zeros(_COPIED_ROWS, np.int32)
                slots = np.full(_COPIED_ROWS, self.options.batch_size, np.int32)
                lengths = np.zeros((len(one.roles), _COPIED_ROWS), np.int32)
                for p, slot in enumerate(targets):
                    sources[p], slots[p] = copies[slot], slot
                    lengths[:, p] = [len(arrivals[slot].ids[role]) - 1 for role in one.roles]
                caches[index] = self._engine.copy(index, caches[index], lengths, sources, slots)
        state = dataclasses.replace(state, caches=tuple(caches))
        return self._set_rows(state, arrivals, pieces)

    def _groups(
        self, roles: Sequence[str], arrivals: Mapping[int, Request], longest_bucket: int
    ) -> Iterator[tuple[int, list[int | None]]]:
        """Slots to prefill together, padded with None, and the length they are padded to.

        A row's bucket and the rows of a prefill depend on the row's own length alone, so that its
        numbers do not depend on which requests it happens to arrive with.
        """
        buckets: dict[int, list[int]] = collections.defaultdict(list)
        for slot, request in arrivals.items():
            longest = max(len(request.ids[role]) - 1 for role in roles)
            buckets[min(bucket(longest), longest_bucket)].append(slot)
        for length, members in sorted(buckets.items()):
            count = prefill_rows(length, self.options.batch_size, self.loaded.place)
            for first in range(0, len(members), count):
                group: list[int | None] = list(members[first : first + count])
                yield length, group + [None] * (count - len(group))

    def _set_rows(
        self, state: DecodeState, rows: Mapping[int, Request | None], pieces: int
    ) -> DecodeState:
        # Always as many rows as slots, so that there is one compiled program.
        missing = self.options.batch_size - len(rows)
        slots = np.asarray([*rows, *[self.options.batch_size] * missing], np.int32)
        new = self._rows([*rows.values(), *[None] * missing], pieces)
        return dataclasses.replace(state, rows=self._engine.admit(state.rows, new, slots))

    def _rows(self, requests: Sequence[Request | None], pieces: int) -> Rows:
        """The engine's view of requests; None is an idle slot."""
        count, roles = len(requests), self.program.roles
        look_back = self.settings.processors.look_back
        penalty = self.settings.processors.repetition_penalty is not None
        vocabulary = self.loaded.trio.vocabulary.size
        rows: dict[str, Any] = {
            "active": np.zeros(count, bool),
            "row": np.zeros(count, np.uint32),
            "last": np.zeros((count, len(roles)), np.int32),
            "generated": np.zeros(count, np.int32),
            "limit": np.zeros(count, np.int32),
            "alpha_starts": np.full((count, pieces), np.iinfo(np.int32).max, np.int32),
            "alpha_values": np.zeros((count, pieces), np.float32),
            "ban_states": np.zeros((count, len(self.bans)), np.int32),
            "recent": np.full((count, look_back), -2, np.int32),
            "seen": np.zeros((count, vocabulary), bool) if penalty else None,
            "broken": np.zeros((count, len(roles) + 1), bool),
        }
        for i, request in enumerate(requests):
            if request is None:
                continue
            base = list(request.ids["base"])
            rows["active"][i] = True
            rows["row"][i] = request.row
            rows["last"][i] = [request.ids[role][-1] for role in roles]
            rows["limit"][i] = request.max_new_tokens
            for piece, (start, value) in enumerate(request.alpha):
                rows["alpha_starts"][i, piece] = start
                rows["alpha_values"][i, piece] = value
            rows["ban_states"][i] = [ban.start(base) for ban in self.bans]
            tail = base[-look_back:] if look_back else []
            rows["recent"][i, look_back - len(tail) :] = tail
            if penalty:
                rows["seen"][i, base] = True
        return Rows(**rows)


@dataclasses.dataclass
class _Slot:
    """A request being decoded, its tokens so far, and what was recorded of them, by chunk."""

    request: Request
    detokenizer: Detokenizer
    ids: list[int] = dataclasses.field(default_factory=list)
    traces: list[Trace] = dataclasses.field(default_factory=list)


def make_requests(
    trio: Trio,
    options: Options,
    prompts: Sequence[str | Prompt],
    alpha: Sequence[float | Schedule] | None = None,
    names: Sequence[str] | None = None,
) -> list[Request]:
    """Renders and tokenises prompts for every role, and checks that they fit the models.

    Args:
      trio: its tokenizer and templates.
      options: how to decode; `options.samples` requests a prompt.
      prompts: texts, or Prompts.
      alpha: one coefficient or schedule a prompt, instead of the options'.
      names: what errors call each prompt; "prompt 0", ... by default.

    Raises:
      InputError: names the prompt and role that is empty or too long, or the stop string or ban
        that cannot take effect; or more requests than a job may have.
    """
    _check_ids(trio, options)
    _check_strings(trio, options)
    string_bans(trio.tokenizer, trio.vocabulary.size, options.banned, options.banned_first)
    if isinstance(prompts, str | Prompt):
        raise InputError("prompts must be a list of prompts, not one alone")
    if alpha is not None and len(alpha) != len(prompts):
        raise InputError(f"{len(alpha)} alphas for {len(prompts)} prompts")
    if len(prompts) * options.samples > _MOST_REQUESTS:
        raise InputError(
            f"{options.samples} samples of {len(prompts)} prompts are more than the "
            f"{_MOST_REQUESTS} completions that a job may have"
        )
    requests = []
    for index, prompt in enumerate(prompts):
        name = names[index] if names else f"prompt {index}"
        prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(prompt, Prompt):
            raise InputError(f"{name}: must be a string or a Prompt, not {shown(prompt)}")
        for text in (prompt.text, prompt.system, prompt.response_prefix):
            check_unicode(text, name)
        if not prompt.text.strip():
            raise InputError(f"{name}: empty prompt")
        if prompt.system and not any(m.template.has_system for m in trio.members.values()):
            raise InputError(f"{name}: a system prompt, but no role's template has a place for it")
        ids = trio.encode(prompt)
        for role, member in trio.members.items():
            context = member.config.max_positions
            if not ids[role]:
                raise InputError(f"{name}: no tokens for {role}")
            if max(ids[role]) >= member.config.vocab_size:
                raise InputError(
                    f"{name}: id {max(ids[role])} is beyond the {member.config.vocab_size} rows "
                    f"of {role}"
                )
            if len(ids[role]) + options.max_new_tokens > context:
                raise InputError(
                    f"{name}: {len(ids[role])} tokens for {role} and {options.max_new_tokens} "
                    f"new ones exceed its context of {context}"
                )
        schedule = as_schedule(options.alpha if alpha is None else alpha[index], f"{name}: alpha")
        requests += [
            Request(index * options.samples + sample, ids, schedule, options.max_new_tokens)
            for sample in range(options.samples)
        ]
    return requests


def longest_contexts(requests: Iterable[Request]) -> dict[str, int]:
    """By role, the most tokens that any request's context may come to."""
    longest: dict[str, int] = {}
    for request in requests:
        for role, ids in request.ids.items():
            longest[role] = max(longest.get(role, 0), len(ids) + request.max_new_tokens)
    return longest


def cache_slots(one: Pass, contexts: Mapping[str, int]) -> int:
    """Cache slots a row of a pass, for the longest contexts of a job by role."""
    return -(-max(contexts[role] for role in one.roles) // _CACHE_GRAIN) * _CACHE_GRAIN


def prefill_rows(length: int, batch_size: int, place: Placement) -> int:
    """Prompts of a bucket that are prefilled together.

    Enough to use the device: a CPU is busy with 128 tokens; on accelerators reading the weights
    takes as long as about a thousand tokens do.
    """
    tokens = 128 if place.platform == "cpu" else 1024
    parts = place.split("batch")
    return -(-max(1, min(tokens // length, batch_size)) // parts) * parts


def bucket(length: int) -> int:
    """The padded length of a prompt: the next power of two, and at least 8."""
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def _check_ids(trio: Trio, options: Options) -> None:
    """Refuses ids that M does not have."""
    for i in options.eos_ids or ():
        if not 0 <= i < trio.vocabulary.size:
            raise InputError(f"eos_ids: {i} is not one of the {trio.vocabulary.size} ids of M")


def _check_strings(trio: Trio, options: Options) -> None:
    """Refuses strings that can never take effect."""
    for text in (*options.banned_tokens, *options.banned_first_tokens):
        _ids(trio, text)
    for text in options.stop:
        if trio.tokenizer.decode(_ids(trio, text), skip_special_tokens=True) == "":
            raise InputError(
                f"stop string {text!r} is a special token, which texts do not show; "
                "put its id into eos_ids"
            )


def _ids(trio: Trio, text: str) -> list[int]:
    ids = trio.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"{text!r} has no tokens in this tokenizer")
    return ids
