"""Chat templates: rendered as transformers does, refused in one line, and never for ever."""

import concurrent.futures
import json
import os
import signal
from typing import Any

import pytest

from proxy_jax import templates
from proxy_jax.errors import InputError
from proxy_jax.templates import render_chat
from tests.trios import make_tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind, {{ and }} é."},
    {"role": "user", "content": "  two <b>lines</b>\nof 'text'  "},
    {"role": "assistant", "content": "It is", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
]
WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].arguments | tojson }}{% endif %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def quick(monkeypatch):
    """Limits that are soon met, in a process of the test's own."""
    monkeypatch.setattr(templates, "_SECONDS", 1)
    monkeypatch.setattr(templates, "_MEMORY", 2**27)
    monkeypatch.setattr(templates, "_CHARACTERS", 1000)
    templates._renderer.close()
    yield
    templates._renderer.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"add_generation_prompt": True},
        {"tools": TOOLS, "add_generation_prompt": True},
        {"continue_final_message": True},
        {},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
@pytest.mark.parametrize(
    "template", [make_tokenizer().chat_template, WITH_TOOLS, {"default": WITH_TOOLS, "rag": "-"}]
)
def test_equal_to_transformers(template, settings):
    tokenizer = tokenizer_with(template)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **settings)
    assert render_chat(tokenizer, MESSAGES, "base", **settings) == expected


def test_the_template_for_tools():
    tokenizer = tokenizer_with({"default": "plain", "tool_use": "{{ tools[0].function.name }}"})
    assert render_chat(tokenizer, MESSAGES, "base") == "plain"
    assert render_chat(tokenizer, MESSAGES, "base", tools=TOOLS) == "f"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system\nrole here') }}", r"\(no system role here\)$"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages | nosuchfilter }}", "No filter named 'nosuchfilter'"),
        ("{{ nobody.name.first }}", "'nobody' is undefined"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% include 'other' %}", "loader"),
        ("{{ range(10**9) | list }}", "too big"),
        ({"rag": "x", "tool_use": "y"}, "no default specified"),
        (7, "must be text, not 7"),
        ({"default": 7}, "must be text, not 7"),
        (None, "its tokenizer has no chat template"),
    ],
)
def test_what_a_template_says_is_one_line(template, says):
    with pytest.raises(InputError, match=f"^expert: .*{says}") as caught:
        render_chat(tokenizer_with(template), MESSAGES, "expert")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("quick")
def test_limits():
    """What runs for ever, or asks for all memory, ends; the next conversation is rendered."""
    nested = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    doubling = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    for template, says in [
        (nested, "takes more than 1 s"),
        (
            "{{ 7 ** (7 ** 12) }}",
            "takes more than 1 s",
        ),  # one instruction, which nothing interrupts
        (doubling + "{% endfor %}", "too much memory"),
        ("{{ ('a' * 10**10) | length }}", "too much memory"),
        ("{{ 'a' | center(10**9) }}", "too much memory"),
        ("{{ 'ab' * 501 }}", "it prints 1002 characters, more than 1000"),
    ]:
        with pytest.raises(InputError, match=f"base: the chat template fails .*{says}"):
            render_chat(tokenizer_with(template), MESSAGES, "base")
    assert render_chat(tokenizer_with("{{ 'ab' * 500 }}"), MESSAGES, "base") == "ab" * 500


def test_from_many_threads():
    tokenizer = tokenizer_with("{{ messages[0].content }}")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = pool.map(
            lambda i: render_chat(tokenizer, [{"role": "user", "content": str(i)}], i), range(100)
        )
        assert list(texts) == [str(i) for i in range(100)]


def test_a_process_that_was_ended_is_started_again():
    tokenizer = tokenizer_with("x")
    assert render_chat(tokenizer, MESSAGES, "base") == "x"
    process = templates._renderer._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert render_chat(tokenizer, MESSAGES, "base") == "x"
    assert templates._renderer._process is not process


def test_an_interrupt_leaves_no_reply_behind(monkeypatch):
    tokenizer = tokenizer_with("{{ messages[0].content }}")

    def interrupted(process, request):
        process.stdin.write(request.encode() + b"\n")
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(templates._renderer, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_chat(tokenizer, [{"role": "user", "content": "first"}], "base")
    assert render_chat(tokenizer, [{"role": "user", "content": "second"}], "base") == "second"


def test_messages_that_are_no_json():
    message: Any = {"role": "user", ("a",): 1}
    with pytest.raises(InputError, match=r"^line 3: .*cannot be used"):
        render_chat(tokenizer_with("x"), [message], "line 3")
    assert json.loads(render_chat(tokenizer_with("{{ messages | tojson }}"), MESSAGES, "base"))
