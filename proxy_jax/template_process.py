"""Renders chat templates, one after the other, under limits. Started by templates.py.

A process of its own: a template is a program that comes with a model's files. It may loop for
ever, and one multiplication inside it may take all memory or days, which nothing in the same
process can end. Nothing of ours is on its path. Requests are lines of JSON on standard input.
"""

import json
import math
import os
import resource
import sys


def main():
    """Answers requests until standard input ends."""
    seconds, memory, characters = map(int, sys.argv[1:])
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    from transformers import PreTrainedTokenizerBase

    tokenizer = PreTrainedTokenizerBase()
    _set_limit(resource.RLIMIT_CORE, 0)
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        _set_limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)
    for line in sys.stdin.buffer:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = math.ceil(usage.ru_utime + usage.ru_stime)
        _set_limit(resource.RLIMIT_CPU, used + seconds)  # ends the process
        replies.write(_answer(tokenizer, line, characters) + b"\n")
        replies.flush()


def _answer(tokenizer, line, characters):
    try:
        arguments = json.loads(line)
        variables = arguments.pop("variables")
        text = tokenizer.apply_chat_template(tokenize=False, **arguments, **variables)
        if len(text) > characters:
            return _error(f"it prints {len(text)} characters, more than {characters}")
        return json.dumps({"text": text}).encode()
    except MemoryError:
        return _error("it needs too much memory")
    except Exception as error:  # whatever a template raises
        return _error(str(error) or type(error).__name__)


def _error(reason):
    return json.dumps({"error": reason[:1000]}).encode()


def _set_limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, hard))


if __name__ == "__main__":
    main()
