//! What fuzzing and thinking have found: a name, the format, the file.

/// An expression many times.
macro_rules! copies {
    ($text:literal) => {
        concat!(
            $text, $text, $text, $text, $text, $text, $text, $text, $text, $text, $text, $text, $text, $text,
            $text, $text, $text, $text, $text, $text, $text, $text, $text, $text, $text, $text, $text, $text,
            $text, $text
        )
    };
}

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
    (
        "many texts of one",
        "template",
        b"{% set ns = namespace(s='x' * 10000) %}{% for i in range(11) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ [ns.s|upper, ns.s[1:], ns.s.upper(), '' + ns.s] * 1000 }}",
    ),
    ("many copies of one text by each way", "template", COPIES.as_bytes()),
    (
        "a long text that is read many times",
        "template",
        b"{% set ns = namespace(s='x' * 10000) %}{% for i in range(11) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{% for i in range(99999) %}{% for j in range(40) %}{{ ns.s|upper|length }}{% endfor %}{% endfor %}",
    ),
    (
        "a text that is read many times",
        "template",
        b"{% set s = 'x' * 10000 %}{% set s = s ~ s ~ s ~ s ~ s ~ s ~ s ~ s ~ s ~ s %}{% for i in range(99999) %}{% for j in range(40) %}{{ s|upper|length }}{% endfor %}{% endfor %}",
    ),
    (
        "texts that are compared many times",
        "template",
        b"{% set s = ('x' * 10000) ~ 'a' %}{% set t = ('x' * 10000) ~ 'a' %}{% for i in range(99999) %}{% for j in range(40) %}{% if s == t and s in [s, t] and s is eq t %}{% endif %}{% endfor %}{% endfor %}",
    ),
    (
        "a text between tags that a block gathers",
        "template",
        b"{% set x %}{% for i in range(99999) %}{% for j in range(40) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% raw %}yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy{% endraw %}{% endfor %}{% endfor %}{% endset %}",
    ),
    ("a template that includes itself", "template", b"x{% for i in range(99999) %}{% include 'chat' %}{% endfor %}"),
    ("a text that is counted by nothing", "template", b"{{ 'x'.count('') }}"),
    ("a long text that is stripped of long texts", "template", b"{% set s = 'x' * 10000 %}{% for i in range(99999) %}{{ s.strip(s) }}{% endfor %}"),
    ("a text padded with a long one", "template", b"{% set s = 'x' * 10000 %}{{ 'x'.ljust(9999999, s)|length }}"),
    ("a text that is joined to itself", "template", b"{% set s = 'x' * 10000 %}{{ s.join([s] * 9999)|length }}{{ ([s] * 9999)|map('upper')|list|length }}"),
    (
        "a list of lists that nobody keeps",
        "template",
        b"{% macro m(l, n) %}{% if n > 0 %}{{ m(l + l, n - 1) }}{% else %}{{ l|list|length }}{% endif %}{% endmacro %}{{ m(['x'], 60) }}",
    ),
    ("a list that is sorted", "template", b"{% set s = 'x' * 10000 %}{{ ([s] * 9999)|sort|length }}{{ ([s] * 9999)|unique|list|length }}{{ ([s] * 9999)|pprint|length }}"),
    ("a list in batches of more than there is memory", "template", b"{{ [1]|batch(4294967296)|list }}"),
    ("a list in more parts than there is memory for", "template", b"{{ [1]|slice(4294967296)|list }}{{ [1]|batch(4294967296, 0)|list }}"),
    (
        "a decoder that strips more than there is",
        "tokenizer",
        br#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"<unk>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true},{"id":1,"content":"<s>","single_word":false,"lstrip":true,"rstrip":true,"normalized":true,"special":true}],"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"\u2581"},{"type":"Replace","pattern":{"String":" "},"content":"\u2581"}]},"pre_tokenizer":null,"post_processor":null,"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"\u2581"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":4294967296}]},"model":{"type":"BPE","dropout":null,"unk_token":"<unk>","continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":true,"byte_fallback":true,"ignore_merges":false,"vocab":{"<unk>":0,"<s>":1,"\u2581":2,"w":3,"h":4,"a":5,"wh":6,"wha":7,"<0x41>":8,"\u2581wha":9},"merges":[["w","h"],["wh","a"],["\u2581","wha"]]}}"#,
    ),
];

/// A text of a million letters, and a list of copies that each line makes.
const COPIES: &str = concat!(
    "{% set s = 'x' * 10000 %}{% set s = s ~ s ~ s ~ s ~ s ~ s ~ s ~ s ~ s ~ s %}",
    "{% set s = s ~ s ~ s ~ s ~ s ~ s ~ s ~ s ~ s ~ s %}{{ [",
    copies!("s|upper,"),
    copies!("s[1:],"),
    copies!("s[::-1],"),
    copies!("s.lower(),"),
    copies!("''+s,"),
    copies!("s|split('x'),"),
    copies!("s|indent(9),"),
    "]|length }}",
);
