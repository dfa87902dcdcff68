#!/usr/bin/env python3
# Made with transformers 5.23.0, jinja2 3.1.6 (requirements.txt).
"""Test vectors of chat templates: what transformers renders.

    python scripts/template_vectors.py FOLDER [--out FILE] [--all]

FOLDER holds published templates, `OWNER-NAME.jinja` each; llama.cpp's
`models/templates` is such a folder, and what it lacks stands in the files of
the models and in catalogues of them. Writes into FILE (default:
`crates/minke-data/tests/vectors/templates.json`)

`cases`     conversations: messages, tools, variables
`snippets`  short templates, one feature of Jinja or Python each, and what
            they give, or null where they are refused
`templates` for each template of the folder what each case gives: its text's
            length in bytes and 64-bit FNV-1a hash, or null where the template
            refuses it. Templates under the Apache or MIT licence stand in the
            file with their text, so that tests need nothing else. Of some
            others, of models that Minke runs, the text's own length and hash
            stand there: tests look for it in the folder that the variable
            MINKE_TEMPLATES names. With --all it is every template, and what
            it gives as text, which
            `cargo run --release --example templates -p minke-data -- FILE FOLDER`
            compares.

The clock stands at 26 July 2024, where Minke's always stands.
"""

import argparse
import datetime
import json
import re
from pathlib import Path

import transformers.utils.chat_template_utils as chat

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "crates/minke-data/tests/vectors/templates.json"
# file name without .jinja: licence of the repository that publishes it
FREE = {
    "Qwen-Qwen2.5-7B-Instruct": "Apache-2.0",
    "Qwen-Qwen3-0.6B": "Apache-2.0",
    "Qwen-QwQ-32B": "Apache-2.0",
    "deepseek-ai-DeepSeek-R1": "MIT",
    "deepseek-ai-DeepSeek-R1-0528": "MIT",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "MIT",
    "deepseek-ai-DeepSeek-V3-0324": "MIT",
    "deepseek-ai-DeepSeek-V3.1": "MIT",
    "mistralai-Mistral-Nemo-Instruct-2407": "Apache-2.0",
    "Mistral-Small-3.2-24B-Instruct-2506": "Apache-2.0",
    "microsoft-Phi-3.5-mini-instruct": "MIT",
    "moonshotai-Moonlight-16B-A3B-Instruct": "MIT",
    "openai-gpt-oss-120b": "Apache-2.0",
}
# whose licence does not let the text stand here, or is not plainly free
HASHED = [
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-V2-Chat",
    "deepseek-ai-DeepSeek-V2.5",
    "google-gemma-2-2b-it",
    "google-gemma-3-1b-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "moonshotai-Kimi-K2",
    "Kimi-K2-Instruct",
    "Kimi-K2-Thinking",
]


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


chat.datetime = Clock


def tool(name, **properties):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up a <{name}> & \"more\" — für alle 鯨",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind, "description": key.upper()} for key, kind in properties.items()},
                "required": list(properties),
            },
        },
    }


def call(name, arguments, ident="abc123def"):
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": " Be brief.\n"}
ASK = {"role": "user", "content": "How deep does a whale dive?  "}
ANSWER = {"role": "assistant", "content": "About 2,992 m <deep>.\n"}
AGAIN = {"role": "user", "content": "鯨は? \"sure\" & 'so' \\n 🐋"}
THOUGHT = {"role": "assistant", "reasoning_content": "\nMany meters.\n", "content": "\n\nDeep."}
INSIDE = {"role": "assistant", "content": "<think>\nMany meters.\n</think>\n\nDeep."}
TOOLS = [tool("depth", animal="string", items="array"), tool("weather", place="string", days="integer")]
ARGS = {"animal": "whale \"minke\" é", "items": [1, 2.5, None, True], "n": {"x": 1e-07, "y": 1e16}}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "name": "depth", "content": "{\"m\": 2992}"}


def with_call(arguments, content):
    return {"role": "assistant", "content": content, "tool_calls": [call("depth", arguments)]}


def two_calls(arguments, other):
    calls = [call("depth", arguments), call("weather", other, "zyx987wvu")]
    return {"role": "assistant", "content": "", "tool_calls": calls}


OTHER = {"place": "Tromsø", "days": 3}
SECOND = {"role": "tool", "tool_call_id": "zyx987wvu", "name": "weather", "content": "cold"}
CASES = {
    "user": dict(messages=[ASK]),
    "prompt": dict(messages=[ASK], add_generation_prompt=True),
    "system": dict(messages=[SYSTEM, ASK], add_generation_prompt=True),
    "turns": dict(messages=[ASK, ANSWER, AGAIN], add_generation_prompt=True),
    "system-turns": dict(messages=[SYSTEM, ASK, ANSWER, AGAIN, ANSWER]),
    "thinks": dict(messages=[ASK, ANSWER, AGAIN], add_generation_prompt=True, enable_thinking=True, thinking=True),
    "thinks-not": dict(messages=[ASK], add_generation_prompt=True, enable_thinking=False, thinking=False),
    "thought": dict(messages=[SYSTEM, ASK, THOUGHT]),
    "thought-past": dict(messages=[ASK, THOUGHT, AGAIN], add_generation_prompt=True),
    "thought-inside": dict(messages=[ASK, INSIDE, AGAIN], add_generation_prompt=True),
    "tools": dict(messages=[SYSTEM, ASK], tools=TOOLS, add_generation_prompt=True),
    "tools-bare": dict(messages=[ASK], tools=TOOLS[:1], add_generation_prompt=True),
    "extra": dict(messages=[ASK], add_generation_prompt=True, extra={"date_string": "1 Jan 2030", "custom": [1]}),
}
# calls in the four ways in which templates want them; the reader gives its own and must tell the same as one of these
for name, arguments, content in [
    ("object", ARGS, ""), ("object-null", ARGS, None), ("text", json.dumps(ARGS, ensure_ascii=False), ""),
    ("text-null", json.dumps(ARGS, ensure_ascii=False), None),
]:
    CASES[f"call-{name}"] = dict(messages=[ASK, with_call(arguments, content)], tools=TOOLS, as_given=True)
    CASES[f"result-{name}"] = dict(
        messages=[SYSTEM, ASK, with_call(arguments, content), RESULT], tools=TOOLS, add_generation_prompt=True, as_given=True)
CASES["said-and-called"] = dict(
    messages=[ASK, {**with_call(ARGS, "Let me see."), "reasoning_content": "Look."}, RESULT], tools=TOOLS,
    add_generation_prompt=True, as_given=True)
CASES["two-calls"] = dict(
    messages=[ASK, two_calls(ARGS, OTHER), RESULT, SECOND, ANSWER, AGAIN], tools=TOOLS, add_generation_prompt=True,
    as_given=True)

VARIABLES = {
    "messages": [{"role": "user", "content": " q é\tz\n"}, {"role": "assistant", "content": "a"}],
    "d": {"b": 1, "a": [True, None, 2.5], "items": 3, "s": "it's \"so\"\n"},
    "xs": [3, 1, 2],
    "names": ["x", "Y", "z"],
    "n": None,
    "big": [{"k": "a", "v": 1}, {"k": "b", "v": 2}, {"k": "a", "v": 3}],
    "text": "The quick brown fox",
    "f": 1e-07,
}
SNIPPETS = r"""
{{ d }}
{{ xs }} {{ names }} {{ [] }} {{ {} }} {{ (1, 2) }} {{ (1,) }}
{{ d.s }}|{{ [d.s] }}|{{ ['\\', "it's", 'say "x"', "both ' and \"", '\t\x01é鯨'] }}
{{ n }}{{ true }}{{ false }}{{ none }}{{ undefined_thing }}
{{ 1.0 }} {{ 0.1 + 0.2 }} {{ 1e16 }} {{ 1e15 }} {{ f }} {{ 1e22 }} {{ 123456789.125 }} {{ -0.0 }} {{ 1e300 * 1e300 }}
{{ [1.0, f, 1e16, -2.5e-5] }}
{{ d | string }}|{{ xs | string }}|{{ n | string }}|{{ 1.0 | string }}
{{ xs | join(', ') }}|{{ [1.0, none, true, 'x'] | join('-') }}|{{ big | join(',', attribute='k') }}
{{ d | tojson }}
{{ d | tojson(indent=2) }}
{{ {} | tojson(indent=2) }}{{ [] | tojson(indent=2) }}{{ {'a': {}} | tojson(indent=4) }}
{{ d | tojson(sort_keys=true) }}
{{ d | tojson(separators=(',', ':')) }}
{{ d | tojson(separators=(',', ': '), indent=1) }}
{{ 'é鯨\u2028<&>\'"\x7f\x1f🐋' | tojson }}
{{ 'é鯨\u2028<&>\'"\x7f🐋' | tojson(ensure_ascii=true) }}
{{ [1.0, f, 1e16, 1e22, 123456789.125, -0.0, 12345678901234567890] | tojson }}
{{ n | tojson }}{{ true | tojson }}{{ 'x' | tojson }}{{ 3 | tojson }}
{{ {1: 'a', true: 'b'} | tojson }}
{{ nothing | tojson }}
{{ xs[0] }}{{ xs[-1] }}{{ xs[1:] }}{{ xs[::-1] }}{{ xs[:-1] }}{{ xs[10:] }}{{ xs[::2] }}
{{ text[4:9] }}|{{ text[::-1] }}|{{ text[-3:] }}|{{ text[0] }}|{{ text[:100] }}
{{ text.split() }}|{{ text.split(' ', 1) }}|{{ text.split('q')[0] }}|{{ text.split('zz') }}|{{ text.rsplit(' ', 1) }}
{{ ' a  b '.split() }}|{{ 'a,b,,c'.split(',') }}|{{ ''.split(',') }}|{{ ''.split() }}
{{ '\n\n x \n'.strip('\n') }}|{{ 'xxaxx'.lstrip('x') }}|{{ 'xxaxx'.rstrip('x') }}|{{ ' a '.strip() }}|{{ 'abcba'.strip('ab') }}
{{ text.startswith('The') }}{{ text.endswith(('cat', 'fox')) }}{{ text.startswith(('a', 'b')) }}{{ text.startswith('quick', 4) }}
{{ text.replace('quick', 'slow') }}|{{ 'aaa'.replace('a', 'b', 2) }}
{{ text.upper() }}|{{ text.lower() }}|{{ text.title() }}|{{ 'aBC dEF'.capitalize() }}|{{ 'aB'.swapcase() }}
{{ text.find('quick') }}{{ text.find('zz') }}{{ text.rfind('o') }}{{ text.count('o') }}{{ text.index('q') }}
{{ text.index('zz') }}
{{ 'abc'.removeprefix('ab') }}|{{ 'abc'.removesuffix('bc') }}|{{ 'abc'.removeprefix('x') }}
{{ 'a=b=c'.partition('=') }}|{{ 'a=b=c'.rpartition('=') }}|{{ 'a'.partition('=') }}
{{ '7'.zfill(3) }}|{{ 'a'.center(5) }}|{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '.') }}
{{ '12'.isdigit() }}{{ 'a1'.isalnum() }}{{ 'a'.isalpha() }}{{ ' '.isspace() }}{{ 'A'.isupper() }}{{ 'a'.islower() }}{{ 'Ab Cd'.istitle() }}
{{ 'a\nb\r\nc'.splitlines() }}|{{ ', '.join(names) }}|{{ 'x{}y{}'.format(1, 'b') }}|{{ '{0}-{a}'.format(1, a=2) }}
{{ '%s is %d' % ('a', 3) }}
{{ '%s' | format('a') }}
{{ 'a' 'b' }}
{{ 'ab' * 3 }}|{{ xs + [9] }}|{{ 7 // 2 }}|{{ 7 % 3 }}|{{ 2 ** 3 }}|{{ 7 / 2 }}|{{ -7 // 2 }}|{{ -7 % 3 }}|{{ 4 / 2 }}
{{ 1 ~ 'a' ~ none ~ true ~ 2.5 }}
{{ 'a' + 1 }}
{{ 'a' + n }}
{{ 'a' + nothing }}
{{ nothing.x }}
{{ nothing }}{{ d.nothing }}{{ d['nothing'] }}{{ xs[7] }}
{{ d.nothing.more }}
{{ n.x }}
{{ nothing() }}
{% for x in nothing %}x{% endfor %}|
{% for x in n %}x{% endfor %}|
{{ 'a' in 'cat' }}{{ 'a' in d }}{{ 3 in xs }}{{ 'z' not in names }}{{ 'a' in ('a', 'b') }}
{{ 'a' in n }}
{{ 'a' in nothing }}
{{ xs is iterable }}{{ 'x' is iterable }}{{ d is iterable }}{{ 3 is iterable }}{{ n is iterable }}
{{ xs is sequence }}{{ 'x' is sequence }}{{ d is sequence }}{{ 3 is sequence }}
{{ d is mapping }}{{ xs is mapping }}{{ 'x' is string }}{{ 1 is number }}{{ true is number }}{{ true is boolean }}{{ 1 is boolean }}
{{ 1 is integer }}{{ 1.0 is float }}{{ 1 is float }}{{ true is integer }}{{ n is none }}{{ nothing is none }}{{ nothing is defined }}{{ nothing is undefined }}
{{ true is true }}{{ 1 is true }}{{ false is false }}{{ raise_exception is callable }}{{ 1 is eq 1 }}{{ 1 is sameas 1 }}{{ 'A' is upper }}{{ 3 is odd }}{{ 3 is divisibleby 3 }}
{{ 1 is in [1] }}{{ 2 is gt 1 }}{{ 2 is not none }}{{ 'a' is equalto 'a' }}
{{ 1 == 1.0 }}{{ '1' == 1 }}{{ [1] == [1] }}{{ {'a': 1} == {'a': 1} }}{{ none == false }}{{ true == 1 }}{{ 'a' < 'b' }}{{ 1 < 2 < 3 }}
{{ not '' }}{{ not [] }}{{ not {} }}{{ not 0 }}{{ not 0.0 }}{{ not none }}{{ not 'a' }}{{ '' or 'x' }}{{ 'a' and 'b' }}{{ 0 or none }}
{{ 'a' if true }}|{{ 'a' if false }}|{{ 'a' if false else 'b' }}
{{ d.items() | list }}|{{ d.keys() | list }}|{{ d.values() | list }}|{{ d | items | list }}|{{ d.get('zz') }}|{{ d.get('zz', 4) }}|{{ d.get('b') }}
{% for k, v in d.items() %}{{ loop.index }}{{ k }}={{ v }}{{ '' if loop.last else ',' }}{% endfor %}
{% for k in d %}{{ k }} {% endfor %}{% for k, v in d | dictsort %}{{ k }}{% endfor %}
{{ d | length }}{{ xs | length }}{{ text | length }}{{ '鯨🐋' | length }}{{ xs | count }}
{{ xs | first }}{{ xs | last }}{{ xs | min }}{{ xs | max }}{{ xs | sum }}{{ xs | sort }}{{ xs | sort(reverse=true) }}{{ xs | reverse | list }}{{ 'abc' | reverse }}
{{ [] | first }}|{{ 'abc' | first }}|{{ 'abc' | last }}|{{ 'abc' | list }}
{{ names | map('upper') | list }}|{{ big | map(attribute='k') | list }}|{{ big | map(attribute='zz', default='-') | join }}
{{ big | selectattr('k', 'equalto', 'a') | list | length }}|{{ big | rejectattr('v', 'gt', 1) | map(attribute='v') | list }}|{{ big | selectattr('k') | list | length }}|{{ big | selectattr('k', 'in', ['a']) | map(attribute='v') | join('+') }}
{{ xs | select('odd') | list }}|{{ xs | reject('equalto', 3) | list }}|{{ [0, 1, ''] | select | list }}
{{ [1, 2, 1] | unique | list }}|{{ big | groupby('k') | map('first') | list }}|{{ xs | batch(2) | list }}{{ xs | batch(2, 0) | list }}{{ xs | slice(2) | list }}{{ xs | slice(2, 'z') | list }}
{% for key, group in big | groupby('k') %}{{ key }}:{{ group | map(attribute='v') | join(',') }};{% endfor %}
{{ nothing | default('x') }}|{{ '' | default('x') }}|{{ '' | default('x', true) }}|{{ none | default('x') }}|{{ none | d('x', boolean=true) }}
{{ '  a ' | trim }}|{{ 'xax' | trim('x') }}|{{ 'a b' | title }}|{{ 'aB' | capitalize }}|{{ 'a' | upper }}|{{ 'a-b' | replace('-', '+') }}
{{ 'a\nb\n\nc' | indent }}|{{ 'a\nb' | indent(2) }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent(width=3, first=true, blank=true) }}|{{ 'a\nb' | indent('> ') }}
{{ '3' | int }}{{ 'x' | int }}{{ 'x' | int(7) }}{{ 3.9 | int }}{{ '2.5' | float }}{{ 2.567 | round(1) }}{{ 2.5 | round }}{{ -3 | abs }}{{ '0x1f' | int(base=16) }}{{ true | int }}
{{ '<a>&"\'' }}|{{ '<a>' | safe }}|{{ '<a>' | e }}|{{ '<a>&"\'' | escape }}
{{ text | wordcount }}|{{ text | truncate(9) }}|{{ 'a' | center(5) }}|{{ '%5.2f' | format(3.14159) }}
{{ 1234567 | filesizeformat }}|{{ 'a b&c' | urlencode }}|{{ '<b>x</b>' | striptags }}
{{ range(3) | list }}{{ range(1, 7, 2) | list }}{{ range(3, 0, -1) | list }}
{{ dict(a=1, b='x') }}|{{ dict(d, c=2) | length }}|{{ dict([('a', 1)]) }}
{% set ns = namespace(a=1) %}{% for x in xs %}{% set ns.a = ns.a + x %}{% set y = x %}{% endfor %}{{ ns.a }}{{ y }}
{% set ns = namespace() %}{% set ns.z = [] %}{% for x in xs %}{% set ns.z = ns.z + [x * 2] %}{% endfor %}{{ ns.z }}{{ ns.q is defined }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set x %}in {{ a }}{% endset %}{{ x }}|{{ x | upper }}
{% macro m(a, b='q') %}[{{ a }}{{ b }}{{ varargs is defined }}]{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}{{ m('x', 'y') }}
{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}in{% endcall %}
{% macro m(x) %}{{ x }}{% if x > 0 %}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(3) }}
{% for x in xs %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.length }}{{ loop.previtem is defined }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }} {% else %}none{% endfor %}
{% for x in [] %}{% else %}none{% endfor %}{% for x in xs if x > 1 %}{{ x }}{{ loop.index }}{% endfor %}
{% for x in xs %}{% if x == 1 %}{% continue %}{% endif %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}
{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }} {% endfor %}{% for x in xs %}{% for y in xs %}{{ loop.index }}{% endfor %}{% endfor %}
{% with a = 3 %}{{ a }}{% endwith %}{{ a is defined }}
{% filter upper %}abc{{ 'd' }}{% endfilter %}
{% generation %}x{% endgeneration %}{%- generation -%} y {%- endgeneration -%}
{% raw %}{{ x }}{% endraw %}{# comment #}{#- tight -#} z
{{ raise_exception('no: ' + text) }}
{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%B %d, %Y') }} {{ strftime_now('%A %H:%M') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[0].content | trim }}{{ messages[0]['content'].strip() }}{{ messages[-1].role }}
{{ messages[0] }}
{{ messages == messages }}{{ messages[0] == messages[1] }}{{ messages[0] in messages }}
{{ messages[0].tool_calls }}{{ messages[0].tool_calls is defined }}{{ messages[0].get('tool_calls', []) }}{{ 'content' in messages[0] }}
{{ xs.append(4) }}
{{ d.update({'x': 1}) }}{{ d }}
{{ d.pop('b') }}
{{ xs.index(1) }}{{ xs.count(3) }}
{{ text.nosuch() }}
{{ text | nosuch }}
{{ text is nosuch }}
{{ ''.__class__ }}|{{ d.__class__ }}|
{{ namespace(_x=1) }}
{% include 'x' %}
{% do xs %}
{{ 5 | string + 'x' }}|{{ (1 + 2) | string }}|{{ 'a' ~ 1 + 2 }}
{{ -xs[0] }}|{{ not true or true }}|{{ 2 + 3 * 2 }}|{{ '3' * 2 }}|{{ not 1 in xs }}
{{ "a\tb\x41\u00e9\"" }}|{{ 'it''s' }}
{{ lipsum is defined }}{{ cycler is defined }}{{ joiner is defined }}{{ range is defined }}{{ self is defined }}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{% set j = joiner(', ') %}{{ j() }}x{{ j() }}y
{%- if true %}  lead {% endif -%}   x
{{ 'x' | attr('zz') is defined }}
{{ xs | map('string') | join('|') }}{{ xs | map('tojson') | join }}
{{ d['items'] }}{{ d.items() | length }}{% for k, v in d.items() %}{{ k }}{% endfor %}
{{ big | tojson | length }}{{ (big | tojson)[:9] }}{{ 'x' | list | tojson }}
{{ [1, 'a', none, true, 1.5] == [1, 'a', none, true, 1.5] }}{{ [[1], [2]] | sum(start=[]) }}
{{ xs | sum(start=10) }}|{{ big | sum(attribute='v') }}|{{ big | sort(attribute='v', reverse=true) | map(attribute='v') | list }}|{{ names | sort }}|{{ names | sort(case_sensitive=true) }}
{{ 1 if n is none else 2 }}{{ (n or {}).get('x', 'dflt') }}{{ (d.zz or []) | length }}
{% if nothing %}a{% elif n %}b{% else %}c{% endif %}{% if d.b and xs and not n %}ok{% endif %}{% if not nothing %}!{% endif %}
{{ 10 | float }}|{{ 10 / 4 }}|{{ 1_000 }}|{{ 0x10 }}|{{ 1e3 }}|{{ 3 | float | string }}
"""
BLOCKS = [
    "a\n  {% if true %}\nb\n  {% endif %}\nc\n",
    "a\n  {%+ if true %}\nb\n  {%- endif +%}\nc\n\n",
    "  {# c #}  x\n {#- d -#}\n y\n",
    "{%- for m in messages %}\n  {{- m.role }}\n{% endfor %}\n",
    "{% for m in messages -%}\n  {{ m.role }}\n{%- endfor %}",
    "{{ 'a' }}\n{{- 'b' -}}\n{{ 'c' }}\n",
    "{% set x = 1 %}\n{% set y = [\n  1,\n  2,\n] %}\n{{ y }}\n",
    "{% set t %}\n  a\n{% endset %}[{{ t }}]",
    "{% macro m(x) -%}\n  {{ x }}\n{%- endmacro %}\n{{ m(1) }}{{ m(x=2) }}\n",
    "\ufeffx\r\ny\r\n{% if true %}\r\nz{% endif %}",
]


def render(source, options):
    options = dict(options)
    extra = options.pop("extra", {})
    options.pop("as_given", None)
    messages = options.pop("messages")
    try:
        [text], _ = chat.render_jinja_template([messages], chat_template=source, **options, **extra)
        return text
    except Exception:  # whatever the template refuses
        return None


def snippet(source):
    try:
        return chat._compile_jinja_template(source).render(**VARIABLES)
    except Exception:
        return None


def fnv(text):
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


# special tokens as the tokenizers of these templates name them
def tokens(name, source):
    if "DeepSeek" in name or "deepseek" in name:
        return {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    if "ama-3" in name:
        return {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    if "gemma" in name:
        return {"bos_token": "<bos>", "eos_token": "<eos>"}
    if "Qwen" in name:
        return {"eos_token": "<|im_end|>"}
    return {"bos_token": "<s>", "eos_token": "</s>"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--all", action="store_true", help="also templates whose text may not stand in the file")
    args = parser.parse_args()
    sources = BLOCKS + [line for line in SNIPPETS.strip("\n").split("\n")]
    snippets = [[source, snippet(source)] for source in sources]
    templates = []
    for path in sorted(args.folder.glob("*.jinja")):
        name = path.stem
        if name not in FREE and name not in HASHED and not args.all:
            continue
        source = path.read_text()
        entry = {"name": name, "tokens": tokens(name, source)}
        if name in FREE and not args.all:
            entry |= {"licence": FREE[name], "source": source}
        elif not args.all:
            entry |= {"text": [len(source.encode()), fnv(source)]}
        told = {}
        for case, options in CASES.items():
            text = render(source, {**entry["tokens"], **options})
            told[case] = None if text is None else [len(text.encode()), fnv(text)]
            if text is not None and args.all:
                told[case].append(text)
        templates.append(entry | {"told": told})
    out = {"variables": VARIABLES, "snippets": snippets, "cases": CASES, "templates": templates}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(out, ensure_ascii=False, indent=1)
    # numbers of bytes and hashes on one line each
    text = re.sub(r"\[\n\s+(\d+),\n\s+(\"[0-9a-f]{16}\")\n\s+\]", r"[\1, \2]", text)
    args.out.write_text(text + "\n")
    refused = sum(result is None for _, result in snippets)
    print(f"{args.out}: {len(snippets)} snippets ({refused} refused), {len(templates)} templates x {len(CASES)} cases")


if __name__ == "__main__":
    main()
