"""Chat templates: the same text as transformers, clear errors, and bounds on hostile templates."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from tests.unit.tokenizer_files import fixture
from tinyllm.chat_template import MAX_OUTPUT_CHARS, MAX_SOURCE_CHARS, ChatTemplate
from tinyllm.errors import InvalidRequestError, TokenizerError
from tinyllm.tokenization import template_sandbox

HI = [{"role": "user", "content": "Hi"}]
CHATS = fixture("chats.json")


def rendered(source: str, **options: Any) -> str:
    return ChatTemplate(source).render(HI, **options)


@pytest.mark.parametrize("chat", CHATS, ids=[chat["name"] for chat in CHATS])
def test_the_text_is_transformers(chat: dict[str, Any]) -> None:
    template = ChatTemplate(chat["template"], {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(chat["messages"], **chat["options"]) == chat["text"]
    assert template.render(chat["messages"], **chat["options"]) == chat["text"]  # nothing is left over from before


def test_variables() -> None:
    assert (
        rendered("{{ add_generation_prompt }} {{ tools }} {{ extra }}", extra=[1, {"a": None}])
        == "True None [1, {'a': None}]"
    )
    assert rendered("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert len(rendered("{{ strftime_now('%Y-%m-%d') }}")) == 10


def test_a_template_cannot_change_the_messages() -> None:
    with pytest.raises(InvalidRequestError, match="unsafe"):
        rendered("{{ messages[0].update({'content': 'x'}) }}")


# -- messages ----------------------------------------------------------------------------------------------------


class Sneaky:
    pass


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list"),
        ("user: hi", "messages must be a list"),
        (None, "messages must be a list"),
        ({"role": "user"}, "messages must be a list"),
        (["hi"], r"messages\[0\] must be a mapping, not str"),
        ([*HI, None], r"messages\[1\] must be a mapping"),
        ([{"content": "Hi"}], r'messages\[0\] must have a "role"'),
        ([{"role": None, "content": "Hi"}], r'messages\[0\] must have a "role"'),
        ([{"role": "user", "content": Sneaky()}], r"messages\[0\]\['content'\] must be plain JSON, not Sneaky"),
        ([{"role": "user", "content": [{"x": {1, 2}}]}], r"\['content'\]\[0\]\['x'\] must be plain JSON, not set"),
        ([{"role": "user", "content": 1 << 300}], "more than 256 bits"),
        ([{"role": "user", 5: "Hi"}], "a key that is not a string"),
        ([{"role": "user"}], "refuses the messages: 'dict object' has no attribute 'content'"),
        ([{"role": "user", "content": None}], "fails on the messages: TypeError"),
        ([{"role": "robot", "content": "Hi"}], "refuses the messages: no robots"),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no\\nrobots') }}{% endif %}"
        "{{ m.role + m.content }}{% endfor %}"
    )
    with pytest.raises(InvalidRequestError, match=message) as caught:
        template.render(messages)
    assert "\n" not in str(caught.value)


def test_deep_messages_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="nested more than 64 deep"):
        ChatTemplate("x").render([{"role": "user", "content": deep}])


def test_a_long_conversation_is_no_hostile_template() -> None:
    source = next(chat["template"] for chat in CHATS if chat["name"] == "qwen tools")
    messages = [{"role": role, "content": "word " * 100} for _ in range(1000) for role in ("user", "assistant")]
    assert len(ChatTemplate(source).render(messages)) > 1_000_000
    gathering = (
        "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}{{ ns.l|length }}"
    )
    assert ChatTemplate(gathering).render(messages) == "2000"


# -- templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for x in y %}", "wrong in line 1"),
        ("\n\n{{ 1 + }}", "wrong in line 3"),
        ("{{ x|no_such_filter }}", "No filter named 'no_such_filter'"),
        ("{% include 'x' %}", "cannot load other templates"),
        ("{% extends 'x' %}", "cannot load other templates"),
        ("{% from 'x' import y %}", "cannot load other templates"),
        ("{% set ns.__class__ = 1 %}", "cannot hold '__class__'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{{ " + "a+" * 20000 + "1 }}", "nested too deeply"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deeply"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "cannot be compiled"),
        ("x" * (MAX_SOURCE_CHARS + 1), f"has {MAX_SOURCE_CHARS + 1} characters"),
    ],
)
def test_templates_that_cannot_be_compiled(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


LONG = "{% set x = 'a' * 1000000 %}"
DOUBLING = (
    "{{% set ns = namespace(x=['a']) %}}{{% for i in range(60) %}}{{% set ns.x = {} %}}{{% endfor %}}{{{{ ns.x }}}}"
)
FOREVER = "{% for i in range(100000) %}{% for j in range(100000) %}" + "{}" + "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ ([1] * 500000) * 500000 }}",
        "{{ 10**10**10 }}",
        "{% set ns = namespace(x=10) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        DOUBLING.format("ns.x + ns.x"),
        DOUBLING.format("ns.x ~ ns.x"),
        DOUBLING.format("[ns.x, ns.x]"),
        DOUBLING.format("(ns.x, ns.x)"),
        DOUBLING.format("{'a': ns.x, 'b': ns.x}"),
        DOUBLING.format("dict(a=ns.x, b=ns.x)"),
        DOUBLING.format("[ns.x]|batch(2, ns.x)|list"),
        "{% set ns = namespace() %}{% set ns.x = [ns] %}",
        "{% set ns = namespace() %}{{ ns }}",
        FOREVER.replace("{}", ""),
        FOREVER.replace("{}", "x"),
        FOREVER.replace("{}", "{% if y in x %}{% endif %}").replace("{%", LONG + "{% set y = x[1:] ~ 'b' %}{%", 1),
        LONG + FOREVER.replace("{}", "{% set y = x[1:] %}"),
        LONG + FOREVER.replace("{}", "{% if x is eq x %}{% endif %}"),
        FOREVER.replace("{}", "{% set y = range(100000)|selectattr('x')|list %}"),
        FOREVER.replace("{}", "{% set a = 1 %}" * 999),
        "{% macro f() %}" + "{% set a = 1 %}" * 999 + "{% endmacro %}" + FOREVER.replace("{}", "{% set y = f() %}"),
        "{% set x = range(100000)|list %}" + FOREVER.replace("{}", "{% set y = loop.changed(x) %}"),
        "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n else '' }}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}" + FOREVER.replace("{}", "x" * 9999) + "{% endmacro %}{% set y = f() %}",
        LONG + "{% set y %}" + FOREVER.replace("{}", "{{ x }}") + "{% endset %}",
        LONG + "{% filter upper %}" + FOREVER.replace("{}", "{{ x }}") + "{% endfilter %}",
        "{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
        "{{ 'a'.center(10**9) }}",
        "{% set f = 'a'.center %}{{ f(10**9) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ ['a']|map('center', 10**9)|list }}",
        "{{ '1'.zfill(10**10) }}",
        "{{ ('\\t' * 1000000).expandtabs(9999) }}",
        "{{ ('\\n' * 1000000)|indent(9999, true) }}",
        "{{ 'a\\nb'|indent('x' * 100000) }}",
        LONG + "{{ x.replace('a', x) }}",
        LONG + "{{ x|replace('a', x) }}",
        LONG + "{{ x.join(['a'] * 100000) }}",
        LONG + "{{ (['a'] * 100000)|join(x) }}",
        LONG + "{{ x.join(range(100000)|map('string')) }}",
        LONG + "{{ ([x] * 3)|map('replace', 'a', x)|list }}",
        LONG + "{{ {}.fromkeys(range(100000), x) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:1000000000}'.format('a') }}",
        "{{ '{:{}}'.format('a', 10**9) }}",
        LONG + "{{ ('{0}' * 1000).format(x) }}",
        LONG + "{{ ('%s' * 1000) % ((x,) * 1000) }}",
        "{{ [1]|batch(10**9, 1)|list }}",
        "{{ [1]|slice(10**9)|list }}",
        "{{ 1.5|round(10**9, 'ceil') }}",
        "{{ ('9' * 100000)|int }}",
        "{{ ([[1] * 99] * 99)|sum(start=[]) }}",
        "{{ [[1]]|tojson(indent=10**9) }}",
        "{{ [1, 2]|tojson(separators=('a' * 1000000, ':')) }}",
        "{{ 'a'.translate({97: 'x' * 1000000}) }}",
        "{{ 'a'.encode() }}",
        "{{ (5).to_bytes(10**9, 'big') }}",
        "{{ range(10**9) }}",
        "{{ strftime_now('%c' * 1000) }}",
        "{{ lipsum(n=100000) }}",
        "{{ namespace(__class__=1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__self__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format_map({'0': 1}) }}",
        "{{ messages|map(attribute='__class__')|list|first }}{{ messages|map(attribute='__class__')|list }}{{ 1/0 }}",
    ],
)
def test_hostile_templates_are_stopped_within_little_memory(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_WORK", 1 << 18)  # watching memory makes all this slow
    template = ChatTemplate(source)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError) as caught:
            template.render(HI)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert peak < 150_000_000


@pytest.mark.parametrize(
    "statement",
    [
        "{% set y = x[1:] %}",
        "{% set y = x ~ 'b' %}",
        "{% set y = x + 'b' %}",
        "{% set y = x == x %}",
        "{% set y = 'b' in x %}",
        "{% set y = x is eq x %}",
        "{% set y = x|upper %}",
        "{% set y = x.upper() %}",
        "{% set y = x.count('b') %}",
        "{% set y = [x]|tojson %}",
        "{% set y = [x, x]|join %}",
        "{% set y = 'b'.join([x, x]) %}",
        "{% set y = '%s' % x %}",
        "{% set y = '{}'.format(x) %}",
        "{% set y = 'b' * 1000000 %}",
        "{% set y %}{{ x }}{% endset %}",
        "{% set y = range(100000)|list %}",
        "{% set y = range(100000)|map('string') %}",
        "{% set y = z|selectattr('a') %}",
        "{% set y = z == z %}",
        "{% set y = z + [1] %}",
        "{% set y = loop.changed(z) %}",
        "{% set y = f() %}",
        "{% for j in range(1000) if false %}{% endfor %}",
        "{% set y = 1 %}" * 2000,
    ],
)
def test_what_costs_time_is_paid_for(statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_WORK", 500_000)
    start = LONG + "{% set z = range(100000)|list %}{% macro f() %}" + "{% set y = 1 %}" * 2000 + "{% endmacro %}"
    rendered(start + "{% for i in range(2) %}{% set y = i %}{% endfor %}")
    with pytest.raises(InvalidRequestError, match="runs for too long"):
        rendered(start + "{% for i in range(1000) %}" + statement + "{% endfor %}")


@pytest.mark.parametrize("source", [FOREVER.replace("{}", ""), FOREVER.replace("{}", "{{ i ~ j }}")])
def test_the_whole_budget_runs_out_too(source: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"runs for too long|writes more than"):
        rendered(source)


@pytest.mark.parametrize(
    "source", ["{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ self.x }}"]
)
def test_internals_print_as_nothing(source: str) -> None:
    assert rendered(source) == ""


def test_the_output_is_bounded() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    content = "x" * (MAX_OUTPUT_CHARS // 2)
    assert len(template.render([{"role": "user", "content": content}] * 2)) == MAX_OUTPUT_CHARS
    with pytest.raises(InvalidRequestError, match=f"writes more than {MAX_OUTPUT_CHARS} characters"):
        template.render([{"role": "user", "content": content}] * 3)


def test_one_rendering_spends_nothing_of_the_next() -> None:
    template = ChatTemplate("{% for i in range(100000) %}{{ i }}{% endfor %}")
    assert len({template.render(HI) for _ in range(8)}) == 1
