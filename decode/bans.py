"""Strings that no text may contain, or begin with, in whatever tokens they are spelled.

An automaton reads a text byte by byte and knows at each byte how much of a banned string it has
just read (Aho and Corasick 1975). Over the bytes of every token that makes a table: in this state,
after this token, that state, or BANNED. The host makes the tables, and gives each row the state
that M's prompt leads to; the compiled step looks up what may not be drawn, and moves on by what is.

Letters: N states, V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from proxy_jax.errors import InputError

BANNED = -1  # in a table: a token after which a banned string would be there
_LARGEST_TABLE = 2**28  # bytes
_BROKEN = "\ufffd"  # what bytes that are no character decode to


@dataclasses.dataclass(frozen=True)
class StringBan:
    """The automaton of some strings over one tokenizer's tokens.

    Attributes:
      moves: [N, 256] int32, the state after a byte; state 0 is that of an empty text.
      ends: [N] bool, whether a banned string has just ended.
      spelled: V strings of bytes, what each token adds to a text.
      anywhere: whether the strings are banned anywhere, or only as the beginning of a text.
      longest: bytes of the longest of them.
    """

    moves: np.ndarray
    ends: np.ndarray
    spelled: Sequence[bytes]
    anywhere: bool
    longest: int

    def table(self) -> np.ndarray:
        """Computes the state after each token, or BANNED, [N, V] int32."""
        states = len(self.moves)
        # Longest tokens first, so that those that have a byte at a place are a slice.
        order = sorted(range(len(self.spelled)), key=lambda i: -len(self.spelled[i]))
        sizes = np.asarray([len(self.spelled[i]) for i in order])
        after = np.repeat(np.arange(states, dtype=np.int32)[:, None], len(order), axis=1)
        hit = np.zeros(after.shape, bool)
        for place in range(int(sizes[0])):
            count = int(np.searchsorted(-sizes, -place))  # those longer than `place`
            column = np.frombuffer(bytes(self.spelled[i][place] for i in order[:count]), np.uint8)
            after[:, :count] = self.moves[after[:, :count], column[None]]
            hit[:, :count] |= self.ends[after[:, :count]]
        table = np.empty_like(after)
        table[:, order] = np.where(hit, BANNED, after)
        return table

    def start(self, prompt: Sequence[int]) -> int:
        """Finds the state of a row before its first new token, from the ids of M's prompt."""
        state = 0
        if self.anywhere:
            text = b"".join(self.spelled[i] for i in prompt)
            for byte in text[-self.longest :]:
                state = self.moves[state, byte]
        return int(state)


def string_bans(
    tokenizer: Any, size: int, banned: Sequence[str], banned_first: Sequence[str]
) -> tuple[StringBan, ...]:
    """Makes the automata of a job: none, one or two.

    Args:
      tokenizer: M's.
      size: V, rows of M's output.
      banned: strings that no text may contain.
      banned_first: strings that no text may begin with.

    Raises:
      InputError: strings that need too large a table or stand for no text, or a tokenizer whose
        tokens' bytes are not known.
    """
    kinds = [(strings, anywhere) for strings, anywhere in ((banned, True), (banned_first, False))
             if strings]  # fmt: skip
    if not kinds:
        return ()
    spelled = token_bytes(tokenizer, size)
    return tuple(_string_ban(strings, spelled, anywhere) for strings, anywhere in kinds)


def _string_ban(strings: Sequence[str], spelled: Sequence[bytes], anywhere: bool) -> StringBan:
    name = "banned" if anywhere else "banned_first"
    if broken := [text for text in strings if _BROKEN in text]:
        raise InputError(f"{name}: {broken[0]!r} has U+FFFD, which stands for what is no character")
    patterns = [text.encode() for text in strings]
    states = sum(map(len, patterns)) + 2
    if 4 * states * len(spelled) > _LARGEST_TABLE:
        most = _LARGEST_TABLE // (4 * len(spelled)) - 2
        raise InputError(
            f"{name}: {states - 2} bytes of strings are too many; the table over "
            f"{len(spelled)} tokens has room for {most}"
        )
    moves, ends = (_search if anywhere else _match)(patterns)
    return StringBan(moves, ends, spelled, anywhere, max(map(len, patterns)))


def _trie(patterns: Sequence[bytes]) -> tuple[list[dict[int, int]], list[bool]]:
    """Children by byte of each state, in which a child comes after its parent, and the ends."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for pattern in patterns:
        state = 0
        for byte in pattern:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                ends.append(False)
            state = children[state][byte]
        ends[state] = True
    return children, ends


def _search(patterns: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Moves and ends of the automaton that finds patterns anywhere."""
    children, ends = _trie(patterns)
    moves = np.zeros((len(children), 256), np.int32)
    shorter = [0] * len(children)  # the state of the longest proper suffix of what a state has read
    queue = collections.deque([0])
    while queue:
        state = queue.popleft()
        ends[state] |= ends[shorter[state]]
        moves[state] = moves[shorter[state]]
        for byte, child in children[state].items():
            shorter[child] = int(moves[state, byte])
            moves[state, byte] = child
            queue.append(child)
    return moves, np.asarray(ends)


def _match(patterns: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Moves and ends of the automaton that finds patterns at the beginning alone."""
    children, ends = _trie(patterns)
    elsewhere = len(children)  # the state of a text that begins otherwise
    moves = np.full((elsewhere + 1, 256), elsewhere, np.int32)
    for state, by_byte in enumerate(children):
        for byte, child in by_byte.items():
            moves[state, byte] = child
    return moves, np.asarray([*ends, False])


def token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """Finds what each token adds to a text; nothing, for special tokens and ids without a token.

    Tokens spell bytes in one of two ways, byte-level BPE's and SentencePiece's. The one is taken
    in which the tokenizer decodes its whole vocabulary.

    Args:
      tokenizer: a transformers tokenizer.
      size: of the model's output; ids beyond it are left out.

    Raises:
      InputError: it is neither.
    """
    words = {i: word for word, i in tokenizer.get_vocab().items() if i < size}
    for i in {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} & words.keys():
        if not _decode(tokenizer, [i, i]):
            del words[i]
    for spelling in (_byte_level, _sentencepiece):
        spelled = [spelling(words[i]) if i in words else b"" for i in range(size)]
        if _decodes_to(tokenizer, spelled):
            return spelled
    raise InputError(
        "banned and banned_first need a tokenizer of byte-level BPE's or SentencePiece's kind; "
        "with this one, banned_tokens and banned_first_tokens ban single spellings"
    )


def _decodes_to(tokenizer: Any, spelled: Sequence[bytes]) -> bool:
    """Whether tokens decode to these bytes, but for the parts of characters among them."""
    texts = {}
    for i, spelling in enumerate(spelled):
        try:
            texts[i] = spelling.decode()
        except UnicodeDecodeError:
            continue
    # Some tokenizers drop the space that a text begins with: another token comes first.
    first = next((i for i, text in texts.items() if text and " " not in text), None)
    if first is None:
        return False
    ids = [first, *(i for i, text in texts.items() if text)]
    return _decode(tokenizer, ids) == "".join(texts[i] for i in ids)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in GPT-2's byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_ALPHABET = _byte_alphabet()
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def _byte_level(word: str) -> bytes:
    """An added token may have characters that stand for no byte, and is itself then."""
    if all(character in _ALPHABET for character in word):
        return bytes(_ALPHABET[character] for character in word)
    return word.encode()


def _sentencepiece(word: str) -> bytes:
    byte = _BYTE.fullmatch(word)
    return bytes([int(byte[1], 16)]) if byte else word.replace("\u2581", " ").encode()
