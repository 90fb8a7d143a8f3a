"""From generated ids to text: detokenisation in context, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens of the prompt that are decoded along with the new ones, so that a tokenizer that drops
# the space before a text's first word does not drop the first new word's.
_CONTEXT = 4


class Detokenizer:
    """Turns the new tokens of one row into text.

    Attributes:
      tokenizer: a transformers tokenizer.
      prompt: the last ids of M's prompt.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self.tokenizer = tokenizer
        self.prompt = list(prompt[-_CONTEXT:])
        self._prefix = self._decode(self.prompt)

    def text(self, ids: Sequence[int]) -> str:
        """The text that ids add to the prompt."""
        return self._decode([*self.prompt, *ids])[len(self._prefix) :]

    def find_stop(
        self, ids: Sequence[int], stop: Sequence[str], new: int
    ) -> tuple[int, str] | None:
        """The fewest tokens whose text contains a stop string, and the text before it.

        A stop string may begin and end inside tokens. Independent of how many tokens come at once.

        Args:
          ids: all new tokens of the row.
          stop: the strings.
          new: how many of the last ids have not been searched before.
        """
        # A character takes at most 4 tokens, so this tail holds any match that ends in a new one;
        # one more, because some tokenizers drop a space before the first.
        tail = new + 4 * max(map(len, stop), default=0) + 1
        if not stop or not _first(self._decode([*self.prompt, *ids][-tail:]), stop):
            return None
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if _first(self.text(ids[:middle]), stop):
                high = middle
            else:
                low = middle + 1
        text = self.text(ids[:low])
        at = _first(text, stop)
        return (low, text[: at[0]]) if at else None

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _first(text: str, stop: Sequence[str]) -> tuple[int] | None:
    found = [at for at in (text.find(string) for string in stop) if at >= 0]
    return (min(found),) if found else None
