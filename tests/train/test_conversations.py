"""Chat rows as published data sets spell them, under templates as published models have them."""

import datetime
import json

import numpy as np
import pytest

from proxy_jax.errors import InputError
from proxy_jax.rows import Row
from tests.trios import CHAT_TEMPLATE, make_tokenizer
from train.examples import make_examples

# How Qwen, Llama and others show tools and calls: arguments are objects.
TOOLS = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</s>{% endif %}"
    "{% for m in messages %}"
    "{% if m.role in ('user', 'tool', 'system') %}<|{{ m.role }}|>{{ m.content }}</s>"
    "{% elif m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or () %}{% set f = c.function or c %}"
    "<call>{{ f.name }}{{ f.arguments | tojson }}</call>{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# How DeepSeek's do: arguments are text.
TEXT_ARGUMENTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or () %}"
    "{{ '<call>' + c.function.name + c.function.arguments + '</call>' }}{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Qwen3's way: the turns behind the last question have reasoning, if empty, and earlier ones none.
REASONING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def call(arguments):
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def learn(tokenizer, template, messages, **fields):
    """The text that is read, and the parts of it that are learnt."""
    tokenizer.chat_template = template
    row = Row("rows.jsonl:1", 1, {"messages": messages, **fields})
    ((example,), _) = make_examples([row], "messages", tokenizer, 512)
    edges = np.flatnonzero(np.diff(example.trained, prepend=False, append=False)).reshape(-1, 2)
    learnt = [tokenizer.decode(example.tokens[start:end]) for start, end in edges]
    return tokenizer.decode(example.tokens), learnt


def refused(tokenizer, template, messages, **fields):
    with pytest.raises(InputError) as error:
        learn(tokenizer, template, messages, **fields)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix("rows.jsonl:1: ")


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_of_a_row_are_shown(tokenizer, tools):
    messages = [user("one"), assistant("two")]
    text, learnt = learn(tokenizer, TOOLS, messages, tools=tools)
    assert text == f"<|system|>{json.dumps(TOOL)}</s><|user|>one</s><|assistant|>two</s>"
    assert learnt == ["two</s>"]
    assert learn(tokenizer, TOOLS, messages, tools=[]) == learn(tokenizer, TOOLS, messages)
    message = "the chat template does not show tools; data.chat_template can set another template"
    assert refused(tokenizer, CHAT_TEMPLATE, messages, tools=tools) == message


@pytest.mark.parametrize("content", ["", None, "Let me look"])
@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'])
def test_calls_are_learnt_as_json(tokenizer, content, arguments):
    messages = [user("one"), assistant(content, tool_calls=[call(arguments)])]
    _, learnt = learn(tokenizer, TOOLS, messages)
    assert learnt == [f'{content or ""}<call>weather{{"city": "Köln"}}</call></s>']


def test_an_answer_that_a_call_leads_to(tokenizer):
    messages = [
        user("one"),
        assistant(None, tool_calls=[call("")]),
        {"role": "tool", "content": "", "tool_call_id": "1", "name": "weather"},
        assistant("four", tool_calls=None),
    ]
    _, learnt = learn(tokenizer, TOOLS, messages)
    assert learnt == ["<call>weather{}</call></s>", "four</s>"]


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_calls_under_a_template_that_takes_text(tokenizer, content, arguments):
    messages = [user("one"), assistant(content, tool_calls=[call(arguments)])]
    _, learnt = learn(tokenizer, TEXT_ARGUMENTS, messages)
    assert learnt == ['<call>weather{"city": "Rome"}</call></s>']


def test_calls_that_cannot_be_used(tokenizer):
    ask = [user("one")]
    for calls, message in (
        ("weather", "tool_calls must be a list of objects, not 'weather'"),
        ([{"function": {"arguments": {}}}], "tool call 1: no field 'name'; it has 'arguments'"),
        ([call("{")], "tool call 1: arguments: not JSON"),
        ([call("3")], "tool call 1: arguments must be an object, not 3"),
    ):
        assert f"message 2: {message}" in refused(
            tokenizer, TOOLS, [*ask, assistant("", tool_calls=calls)]
        )
    naive = refused(tokenizer, CHAT_TEMPLATE, [*ask, assistant("a", tool_calls=[call({})])])
    assert naive.startswith("message 2: the chat template does not show tool_calls")


def test_a_template_that_prints_arguments_as_they_are_gets_json(tokenizer):
    """And not a Python dictionary."""
    template = TOOLS.replace("f.arguments | tojson", "f.arguments")
    messages = [user("one"), assistant("", tool_calls=[call({"n": True})])]
    assert learn(tokenizer, template, messages)[1] == ['<call>weather{"n": true}</call></s>']


def test_weights(tokenizer):
    messages = [
        assistant("zero", weight=0),
        user("one"),
        assistant("two", weight=0),
        user("three"),
        assistant("four", weight=1),
    ]
    text, learnt = learn(tokenizer, CHAT_TEMPLATE, messages)
    assert "two" in text
    assert learnt == ["four</s>"]
    for weight in (0.5, 2, True, "1"):
        turn = assistant("two", weight=weight)
        assert refused(tokenizer, CHAT_TEMPLATE, [user("one"), turn]).startswith(
            "message 2: weight must be "
        )
    turn = user("one", weight=1)
    assert "weight is for the assistant's" in refused(tokenizer, CHAT_TEMPLATE, [turn, turn])
    unlearnt = [user("one"), assistant("two", weight=0)]
    assert "no message of the assistant" in refused(tokenizer, CHAT_TEMPLATE, unlearnt)


def test_an_empty_system_message_is_none(tokenizer):
    messages = [user("one"), assistant("two")]
    system = {"role": "system", "content": ""}
    assert learn(tokenizer, CHAT_TEMPLATE, [system, *messages]) == learn(
        tokenizer, CHAT_TEMPLATE, messages
    )
    empty = [system, user(""), assistant("two")]
    assert refused(tokenizer, CHAT_TEMPLATE, empty) == "message 2: content is empty"


def test_what_a_template_leaves_out_is_refused_by_name(tokenizer):
    answer = assistant("two")
    human = {"role": "human", "content": "one"}
    assert refused(tokenizer, TOOLS, [human, user("one"), answer]).startswith(
        "message 1: the chat template does not show content (role 'human')"
    )
    for name, value in (("function_call", {"name": "f"}), ("train", True), ("mood", "glad")):
        message = refused(tokenizer, TOOLS, [user("one"), assistant("two", **{name: value})])
        assert message.startswith(f"message 2: the chat template does not show {name} ")
    for name in ("system", "functions", "chat_template_kwargs", "weight"):
        message = refused(tokenizer, TOOLS, [user("one"), answer], **{name: {"a": 1}})
        assert message == f"{name} is not read, and changes what a row teaches"
    notes = {"id": 3, "source": "web", "prompt": "one"}
    nothing: dict[str, object] = {"refusal": None, "function_call": None, "annotations": []}
    plain = learn(tokenizer, TOOLS, [user("one"), answer])
    assert learn(tokenizer, TOOLS, [user("one", name="Ann"), answer | nothing], **notes) == plain


def test_a_default_system_message_may_be_said(tokenizer):
    template = "{% if messages[0].role != 'system' %}<|system|>Be brief</s>{% endif %}"
    messages = [user("one"), assistant("two")]
    said = [{"role": "system", "content": "Be brief"}, *messages]
    template += CHAT_TEMPLATE
    assert learn(tokenizer, template, said) == learn(tokenizer, template, messages)


def test_reasoning_is_learnt_of_the_last_turn_or_refused(tokenizer):
    last = assistant("two", reasoning_content="because")
    _, learnt = learn(tokenizer, TOOLS, [user("one"), last])
    assert learnt == ["<think>because</think>two</s>"]
    message = refused(tokenizer, TOOLS, [user("one"), last, user("three"), assistant("four")])
    assert message.startswith("message 2: the chat template shows it otherwise once the convers")
    assert "data.chat_template" in message
    read = [user("one"), last | {"weight": 0}, user("three"), assistant("four")]
    assert learn(tokenizer, TOOLS, read)[1] == ["four</s>"]
    drops = CHAT_TEMPLATE.replace("message['content']", "message.content.split('</think>')[-1]")
    message = refused(tokenizer, drops, [user("one"), assistant("<think>hm</think>two")])
    assert message.startswith("message 2: the chat template does not show all of its content")
    opens = drops.replace("{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think>")  # fmt: skip  # noqa: E501
    assert opens != drops
    message = refused(tokenizer, opens, [user("one"), assistant("two")])
    assert "as a continuation of the prompt before it" in message


def test_turns_that_change_as_the_conversation_goes_on(tokenizer):
    two = [user("one"), assistant("two"), user("three"), assistant("four")]
    assert learn(tokenizer, REASONING, two[:2])[1] == ["<think></think>two</s>"]
    message = refused(tokenizer, REASONING, two)
    assert message.startswith("message 2: the chat template shows it otherwise once")
    assert "data.chat_template" in message
    # What stands behind the last answer teaches nothing, and would take its reasoning away.
    assert learn(tokenizer, REASONING, two[:3]) == learn(tokenizer, REASONING, two[:2])
    text, learnt = learn(tokenizer, REASONING, [two[0], two[1] | {"weight": 0}, *two[2:]])
    assert text == (
        "<|user|>one</s><|assistant|>two</s><|user|>three</s><|assistant|><think></think>four</s>"
    )
    assert learnt == ["<think></think>four</s>"]


def test_templates_that_print_a_date_print_that_of_the_run(tokenizer):
    tokenizer.chat_template = "<|system|>{{ strftime_now('%d %b %Y') }}</s>" + CHAT_TEMPLATE
    row = Row("rows.jsonl:1", 1, {"messages": [user("one"), assistant("two")]})
    date = datetime.date(2024, 2, 29)
    ((example,), _) = make_examples([row], "messages", tokenizer, 512, date=date)
    assert tokenizer.decode(example.tokens).startswith("<|system|>29 Feb 2024</s>")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages.absent.more }}",
        "{{ 'a' + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}{{ messages.__init__.__globals__ }}",
    ],
)
def test_templates_that_fail_name_the_row(tokenizer, template):
    message = refused(tokenizer, template, [user("one"), assistant("two")])
    assert message.startswith("the chat template fails (")
