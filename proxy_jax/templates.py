"""Chat templates: a conversation as the text that a model was trained to read."""

from __future__ import annotations

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxy_jax.errors import InputError
from proxy_jax.reading import reading, reason, shown

_PROGRAM = Path(__file__).with_name("template_process.py")
_SECONDS = 5  # of processor time for one conversation; it takes a millisecond
_MEMORY = 2**29  # bytes beside those of the idle process
_CHARACTERS = 2**23  # of one rendered conversation


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    where: object,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """Renders a conversation with a tokenizer's chat template, as transformers does.

    Templates run in a process of their own, under limits of processor time, memory and length of
    what they print. It starts with the first call and lasts; any thread may call.

    Args:
      tokenizer: a transformers tokenizer.
      messages: JSON objects, mostly {"role", "content"}.
      where: what errors name, a role or "file:3".
      tools: JSON schemas of functions, for templates that have a place for them.
      add_generation_prompt: end with what opens the assistant's turn.
      continue_final_message: leave the last message open, to be continued.

    Raises:
      InputError: there is no template, or none for this use, or it fails: then with what it said.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{where}: its tokenizer has no chat template")
    with reading(where, "the tokenizer's chat template cannot be used"):
        template = tokenizer.get_chat_template(tools=tools)
        if not isinstance(template, str):
            raise InputError(f"{where}: a chat template must be text, not {shown(template)}")
        request = {
            "conversation": messages,
            "chat_template": template,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "variables": tokenizer.special_tokens_map,
        }
        reply = _renderer.ask(json.dumps(request, default=_plain))
    if "error" in reply:
        raise InputError(f"{where}: the chat template fails ({reason(Exception(reply['error']))})")
    return reply["text"]


def _plain(value: Any) -> Any:
    """Mappings as objects and special tokens, which may be more than a string, as strings."""
    return dict(value) if isinstance(value, Mapping) else str(value)


class _Renderer:
    """The process that renders, started when first asked and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: str) -> dict[str, str]:
        """Gives {"text"} or {"error"}.

        Raises:
          RuntimeError: the process does not start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            try:
                line = self._exchange(self._process, request)
            except BaseException:  # an interrupt leaves a reply behind that nobody reads
                self._end()
                raise
            if line.endswith(b"\n"):
                return json.loads(line)
            status = self._process.wait()
            self._end()
        if status == -signal.SIGXCPU:
            return {"error": f"it takes more than {_SECONDS} s"}
        if status < 0:
            return {"error": f"it ends the process that renders it, with signal {-status}"}
        raise RuntimeError(f"{_PROGRAM} ended with status {status}")

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            if self._process is not None:
                self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # -P: this directory is not on its path.
            [sys.executable, "-P", str(_PROGRAM), str(_SECONDS), str(_MEMORY), str(_CHARACTERS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for its parent, with which it ends
        )

    def _exchange(self, process: subprocess.Popen[bytes], request: str) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
        return process.stdout.readline()

    def _end(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        process.kill()
        with contextlib.suppress(BrokenPipeError), process:  # closes the pipes and waits
            pass


_renderer = _Renderer()
atexit.register(_renderer.close)
