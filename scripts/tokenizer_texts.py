# ruff: noqa: E501, RUF001 - texts and templates keep their own lines and characters
"""Inputs of make_tokenizer_fixtures.py: a small corpus to train on, hard texts to encode, conversations to write."""

from __future__ import annotations

from typing import Any

__all__ = ["CHATS", "CORPUS", "hard_texts"]

CORPUS = """\
The quick brown fox jumps over the lazy dog. The dog doesn't mind; it's asleep, and it'll stay asleep until they're gone.
In the beginning there was a tokenizer, and the tokenizer read text, and the text was made of words and the words of bytes.
She said: "I've seen 12 of them in 1984, 25 in 2001, and 1,000,000 by 2024." We'd have said the same, wouldn't we?
def encode(self, text: str) -> list[int]:
    for index, char in enumerate(text):
        if char not in self.vocab and index != 0:
            return [self.ids[c] for c in text.split(" ")]  # see https://example.com/a?b=c&d=e
    print(f"{index:>10} == {char!r}", end="\\n\\t")
Il était une fois un très petit élève qui s'appelait François; où est-il allé? Ça, personne ne le sait.
Der Übermut tut selten gut, und die Größe der Straße ändert daran nichts. Fünfzig Bäume stehen im Wald.
Быстрая коричневая лиса прыгает через ленивую собаку, и собака не против этого.
敏捷的棕色狐狸跳过了懒狗。今天天气很好，我们去公园散步吧。你好，世界！
いろはにほへと ちりぬるを わかよたれそ つねならむ。こんにちは、世界。
다람쥐 헌 쳇바퀴에 타고파. 안녕하세요, 세계!
السلام عليكم ورحمة الله وبركاته. مرحبا بالعالم
नमस्ते दुनिया, आज का दिन अच्छा है।
One 1, two 22, three 333, four 4444, five 55555; a + b = c, x < y, p >= q, m != n, i++ and j--.
"""

_EMOJI = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
_TEXTS = [
    # nothing, spaces, lines
    "", " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\n\n\n", "\n\n\n\n\n", " \n", "\n ", " \n \n ", "\t\t\tx", "    x",
    "x    ", "x \n", "a  b   c    d", " a", "  a", "a ", "\u00a0", "a\u00a0b", "\u3000\u3000x", "\u2028", "\x85a", "\x0b\x0c",
    # digits
    "0", "1", "12", "123", "1234", "12345678901234567890", "3.14159", "1,000,000", "1 2 3", "a1b2c3", "0x1F", "1e-5", "-1",
    "\u00b2\u00b3\u00b9", "\u0661\u0662\u0663", "\u2167 \u2160", "\u00bd cup", "\u096a\u0968", "\u3007\u4e00\u4e8c",
    "2024-12-31T23:59:59Z", "+1 (555) 010-9999", "$1,234.56", "100%", "1st 2nd 3rd", "v1.2.3-rc4",
    # words
    "Hello", "Hello world", "Hello, world!", "hello HELLO HeLLo", "can't won't it's I'm we'll they're I've he'd",
    "CAN'T WON'T IT'S I'M WE'LL THEY'RE I'VE HE'D", "'s 't 'll '", "don\u2019t", "''''", "o'clock's", "It'S", "'\u017f",
    "camelCase PascalCase snake_case kebab-case SCREAMING_CASE", "HTTPServer2Go", "e.g. i.e. etc.", "...", "?!?!", "\u2026",
    "antidisestablishmentarianism", "a" * 300, "ab" * 150, "supercalifragilistic" * 10, "-" * 100, "=" * 33, "." * 17,
    "an unmerged word", "unmerged unmerged", "a\ua7cb 1\ua7cb", "the the the the", "The dog doesn't mind.", "xyz" * 5,
    # punctuation and symbols
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "a+b=c", "x<y>z", "(a) [b] {c}", "\u00ab guillemets \u00bb", "\u201cquotes\u201d",
    "\u20ac\u00a3\u00a5\u20bf", "\u00a9\u00ae\u2122", "\u2190\u2191\u2192\u2193", "\u2200x\u2208\u211d: x\u00b2\u22650", "\u00b1\u00d7\u00f7\u221e",
    "#hashtag @user", "a/b\\c", "C:\\Users\\x", "https://example.com/a?b=c&d=e#f", "user@example.com", "~/.bashrc", "$HOME",
    # code
    "def f(x):\n    return x + 1\n", "if (a && b || !c) { d[0] += 1; }", "for i in range(10):\n\tprint(i)\n\n\n", "<div class=\"a\">&nbsp;</div>",
    "SELECT * FROM t WHERE a='b';", "x = {\n    'a': [1, 2],\n    'b': None,\n}\n", "// comment\n/* block */", "#include <stdio.h>\r\n\r\nint main() {}",
    "\\n\\t\\u0041", "a->b::c", "a\n\n\n\nb", "a\r\n\r\nb", "    \n    x\n", "\t \t x", "lambda x: (x**2, x//2, x%3)", "```py\nx\n```",
    # scripts
    "\u00e9\u00e8\u00ea\u00eb", "na\u00efve caf\u00e9", "cafe\u0301", "\u00c5ngstr\u00f6m \u212bngstr\u00f6m", "Stra\u00dfe STRASSE", "\u0130stanbul \u0131",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01", "\u4eca\u5929\u5929\u6c14\u5f88\u597d", "\u3053\u3093\u306b\u3061\u306f", "\u30ab\u30bf\u30ab\u30ca \uff76\uff80\uff76\uff85", "\uc548\ub155\ud558\uc138\uc694", "\u1112\u1161\u11ab",
    "\u0645\u0631\u062d\u0628\u0627", "\u0645\u064e\u0631\u0652\u062d\u064e\u0628\u064b\u0627", "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd", "\u200fabc\u200e \u202e123\u202c", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e23\u0e31\u0e1a",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440", "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5", "\u0531\u0532\u0533", "\u10d0\u10d1\u10d2", "\u1f600\u1f00", "\ua7cb\u1c89\U000105c0",
    "\uff21\uff22\uff23\uff11\uff12\uff13", "\U0001d400\U0001d401 \U0001d7d8\U0001d7d9", "\U00020000\U0002a6d6", "\u01c5\u02b0\u00aa", "mixed\u4e2d\u6587and\uc601\uc5b4",
    "Za\u0335l\u0336g\u0337o\u0338\u0301\u0302\u0303\u0304\u0305", "\u0301", "a\u0301\u0301\u0301", "\u0915\u094d\u200d\u0937",
    # emoji
    "\U0001f600", "\U0001f44d\U0001f3fd", _EMOJI, f"a{_EMOJI}b", "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", "\u2764\ufe0f", "1\ufe0f\u20e3", "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    # odd characters: controls, noncharacters, private use, bytes that some vocabularies lack
    "\x00", "a\x00b", "a\x04b\x06c", "\x1b[31mred\x1b[0m", "\x7f", "\ufeffBOM", "\ufffd", "a\ufffd\ufffdb", "\uffff", "\ufdd0", "\ue000", "\U0010ffff", "a\U00050000b",
    "\u200b\u200c\u200d", "\u00adsoft", "\u2060", "\u2581", "a\u2581b \u2581\u2581", "\u0120\u010a", "<0x41>", "<0x0A><0xFF>", "[EMPTY_1]",
    # special tokens in the text
    "<|im_start|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>b", " <|im_end|> ", "<|im_end|><|im_end|>",
    "<|im_start", "|im_start|>", "<|im<|im_end|>", "<<|im_end|>>", "<|endoftext|>", "<|endoftext|>a <|endoftext|> b", "<s>", "</s>", "a</s>b", "<s>x</s>",
    "<unk>", "<start_of_turn>user\nhi<end_of_turn>\n", "a <end_of_turn> b", "<|IM_END|>", "<|im_end|", "a\n\n\nb", "\n\n\n\n\n\n\n", "<|eot_id|>x<|begin_of_text|>",
    " <mask> a", "a <mask>b", "<tool>x</tool>", "<repo_name>a<file_sep>b", "<reponame>",
    # long
    "The quick brown fox jumps over the lazy dog. " * 8, "\n".join(f"{i}: {i * i}" for i in range(30)), "\u4e16\u754c" * 60, " " * 100 + "x", "\n" * 40, "\U0001f600" * 20,
]  # fmt: skip


def hard_texts() -> list[str]:
    """About 230 texts on which tokenizers differ, and the lines of the corpus."""
    return [*_TEXTS, *CORPUS.splitlines()]


_TALK = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": " Hello! "}, {"role": "user", "content": "2 < 3?\nYes & no"}]  # fmt: skip
_SYSTEM = [{"role": "system", "content": "Be brief."}, *_TALK]
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, in \u00b0C <now>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_TOOL_TALK = [
    *_TALK[:1],
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "K\u00f6ln"}}}]},
    {"role": "tool", "content": "21"},
    {"role": "tool", "content": "22"},
]  # fmt: skip

_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""
_LLAMA3 = """\
{%- set loop_messages = messages -%}
{%- for message in loop_messages -%}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -%}
    {%- if loop.index0 == 0 -%}{%- set content = bos_token + content -%}{%- endif -%}
    {{- content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
_LLAMA31 = """\
{{- bos_token }}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if tools is not none and not tools_in_user_message %}Environment: ipython{{ "\\n" }}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("This model only supports single tool-calls at once!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
"""
_GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
_MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
_QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
_FEATURES = """\
{% macro turn(role, text='-') %}[{{ role }}|{{ text|upper }}{% if caller %}{{ caller() }}{% endif %}]{% endmacro %}
{% for m in messages if m.role != 'system' %}
  {% if loop.index > 2 %}{% break %}{% endif %}
  {% generation %}{{ turn(m.role, m.content.strip()) }}{% endgeneration %}
{% else %}nothing
{% endfor %}
{% call turn('x') %}!{% endcall %}
{% set block %}{{ messages|map(attribute='role')|join(', ') }}{% endset %}
{{ block }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ (messages|first).content ~ 1 ~ none ~ true ~ 2.5 }}
{{ {'a': [1, 2.0, none, true], 'b<': 'x"\u00e9'} }} {{ {'b': 1, 'a<': '\u00e9'}|tojson }} {{ 'a-b-c'.split('-')[1:]|tojson(separators=(',', ':')) }}
{{ '%s and %03d' % ('x', 7) }} {{ '{} {b:>4}'.format(1, b=2) }} {{ 7 // 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 'ab' * 2 }} {{ [1] + [2] }}
{{ undefined_name }}{{ undefined_name is defined }} {{ messages[0].nothing is none }} {{ 'x' in 'xyz' and 3 > 2 >= 2 }} {{ range(3)|list }}
{{ 'some words'|title }} {{ [3, 1, 2]|sort|reverse|list }} {{ {'k': 1}.items()|list }} {{ 'a\\nb'|indent(2) }} {{ documents }} {{ tools is none }}
{{ '{0[role]}'.format(messages[0]) }} {{ ' x '|trim|length }} {{ 'abc'[::-1] }} {{ loop is defined }} {{ 'q'|default('z') }} {{ nope|default('z') }}
"""

# (name, template, messages, options of apply_chat_template)
CHATS: list[tuple[str, str, list[dict[str, Any]], dict[str, Any]]] = [
    ("chatml", _CHATML, _TALK, {"add_generation_prompt": True}),
    ("chatml with system", _CHATML, _SYSTEM, {"add_generation_prompt": False}),
    ("llama 3", _LLAMA3, _SYSTEM, {"add_generation_prompt": True}),
    ("llama 3 no prompt", _LLAMA3, _TALK, {"add_generation_prompt": False}),
    ("llama 3.1 tools", _LLAMA31, _TOOL_TALK, {"add_generation_prompt": True, "tools": [_TOOL]}),
    ("llama 3.1", _LLAMA31, _SYSTEM, {"add_generation_prompt": True, "tools_in_user_message": False}),
    ("gemma", _GEMMA, _TALK, {"add_generation_prompt": True}),
    ("gemma 3", _GEMMA3, _SYSTEM, {"add_generation_prompt": True}),
    ("gemma 3 parts", _GEMMA3, [{"role": "user", "content": [{"type": "text", "text": " hi "}]}], {"add_generation_prompt": True}),
    ("mistral", _MISTRAL, _SYSTEM, {"add_generation_prompt": False}),
    ("mistral no system", _MISTRAL, _TALK, {"add_generation_prompt": True}),
    ("qwen", _QWEN, _SYSTEM, {"add_generation_prompt": True}),
    ("qwen tools", _QWEN, _TOOL_TALK, {"add_generation_prompt": True, "tools": [_TOOL, _TOOL]}),
    ("qwen no thinking", _QWEN, _TALK, {"add_generation_prompt": True, "enable_thinking": False}),
    ("features", _FEATURES, _SYSTEM, {"add_generation_prompt": True}),
]  # fmt: skip
