"""From generated ids to text: detokenisation in context, and stop strings."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

# Tokens of the prompt that are decoded along with the new ones, so that a tokenizer that drops
# the space before a text's first word does not drop the first new word's.
_CONTEXT = 4
_BYTES = 4  # of the longest character
_BROKEN = "\ufffd"  # what a part of a character decodes to


class Detokenizer:
    """Turns the new tokens of one row into text.

    Attributes:
      tokenizer: a transformers tokenizer.
      prompt: the last ids of M's prompt, from the beginning of a character on.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self.tokenizer = tokenizer
        count = _CONTEXT
        while count < len(prompt) and _BROKEN in self._decode(prompt[-count:]):
            count *= 2
        self.prompt = list(prompt[-count:])
        self._prefix = self._decode(self.prompt)

    def text(self, ids: Sequence[int]) -> str:
        """The text that ids add to the prompt."""
        return self._decode([*self.prompt, *ids])[len(self._prefix) :]

    def find_stop(
        self, ids: Sequence[int], stop: Sequence[str], least: int = 0
    ) -> tuple[int, str] | None:
        """Finds the fewest tokens whose text contains a stop string, and the text before it.

        A stop string may begin and end inside tokens. Independent of how many tokens come at once.

        Args:
          ids: new tokens.
          stop: the strings.
          least: a string that begins in the text of so many tokens does not count.
        """
        if not stop or len(ids) <= least:
            return None
        # A character that these tokens only begin is not yet of their text.
        start = len(self.text(ids[:least]).rstrip(_BROKEN)) if least else 0

        def found(count: int) -> bool:
            return _first(self.text(ids[:count]), stop, start) is not None

        if not found(len(ids)):
            return None
        # Found once, a stop string stays, but for the tokens of a character that is not yet whole.
        count = bisect.bisect_left(range(1, len(ids)), True, key=found) + 1
        while earlier := [c for c in range(max(1, count - _BYTES), count) if found(c)]:
            count = earlier[0]
        text = self.text(ids[:count])
        return count, text[: _first(text, stop, start)]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _first(text: str, stop: Sequence[str], start: int) -> int | None:
    """Where the first stop string begins, at `start` or after it."""
    return min((at for each in stop if (at := text.find(each, start)) >= 0), default=None)
