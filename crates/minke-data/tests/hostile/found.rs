//! What fuzzing and thinking have found: a name, the format, the file.

/// Each was a panic, a crash, or too much memory or time once.
pub const FOUND: &[(&str, &str, &[u8])] = &[
    ("a template that holds itself", "template", b"{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}{{ 'x' ~ ns }}"),
    (
        "a template that holds itself in two steps",
        "template",
        b"{% set a = namespace() %}{% set b = namespace(x=a) %}{% set a.x = [b] %}{{ a == b }}{{ 'x' ~ a }}",
    ),
    (
        "a text that doubles",
        "template",
        b"{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
    ),
    (
        "a text that is added to itself",
        "template",
        b"{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s|length }}",
    ),
    (
        "a text that is replaced by itself",
        "template",
        b"{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(9) %}{% set ns.s = ns.s|replace('a', ns.s) %}{% endfor %}",
    ),
    (
        "a text that is formatted wide",
        "template",
        b"{{ '{:>999999999}'.format('x') }}{{ '%999999999d'|format(1) }}",
    ),
    (
        "texts that are multiplied and kept",
        "template",
        b"{% set ns = namespace(l=[]) %}{% for i in range(999) %}{% set ns.l = ns.l + ['x' * 99999999] %}{% endfor %}",
    ),
    (
        "a block of text that doubles",
        "template",
        b"{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(64) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    ),
    (
        "lists within lists",
        "template",
        b"{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
    ),
    (
        "a list that doubles when it is written",
        "template",
        b"{% set ns = namespace(l=['x']) %}{% for i in range(64) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}{{ ns.l|tojson }}",
    ),
    (
        "a macro that doubles its text",
        "template",
        b"{% macro m(s, n) %}{% if n > 0 %}{{ m(s ~ s, n - 1) }}{% else %}{{ s|length }}{% endif %}{% endmacro %}{{ m('xxxxxxxx', 60) }}",
    ),
];
