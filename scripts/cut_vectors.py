#!/usr/bin/env python3
# Made with regex 2026.11.19 and the source of llama.cpp in llama-cpp-python 0.3.36.
"""Test vectors of how text is cut before merging: what llama.cpp's patterns give in another engine.

    python scripts/cut_vectors.py LLAMA_CPP [--out FILE]

LLAMA_CPP is a folder with llama.cpp's source. Reads the patterns of each name
of `tokenizer.ggml.pre` from `src/llama-vocab.cpp`, cuts hard texts by them
with Python's `regex`, and writes the pieces into FILE (default:
`crates/minke-data/tests/vectors/cuts.json`). Patterns are applied one after
the other, each to what those before left whole.
"""

import argparse
import json
import re
from pathlib import Path

import regex

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_OUT = ROOT / "crates/minke-data/tests/vectors/cuts.json"
# llama.cpp cuts as Kimi does by hand; its comments in `src/unicode.cpp` have the pattern of `tokenization_kimi.py`
KIMI = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])
TEXTS = [
    "",
    "Hello, World! It's what we'd say: they'LL, I'M, you'Re, rock'n'roll, 'tis.",
    "It’s “quoted” — naïve café, Straße, ÀÉÎ, ĲsselMeer ǅungla",
    "1 22 333 4444 55555 1234567890 3.14159 1,000,000 0x1F ½ ² ٣٤٥ १२३ Ⅷ",
    "a1b22c333 x86_64 v2.0-rc1 2nd 3rd",
    "camelCase PascalCase HTTPServer XMLHttpRequest iPhone aB ABc abC A a",
    " leading  two   three    four\ttab\t\ttabs",
    "trailing   ",
    "line\nline\n\nline\r\nline\r\n\r\n   indented\n\t\tmore  \n  \n end\n",
    "\n", "\r\n", "   ", " \n ", "\n\n\n", "\t", " \u00a0\u2003\u3000wide spaces\u00a0x\u2028y\u200bz",
    "def f(x):\n    return x**2 + 3 # ok?\n\n\nclass A:\n\tpass\n",
    "/* a */ //b\n<tag attr=\"v\">&amp;</tag> {}[]()<>!=== -> => ... ?! $5 ~/x/y.z\\n `code` ^~|",
    "鯨は深く潜る。くじら、クジラ！ミンククジラ123頭",
    "中文和English混合，数字１２３，標點。『引號』〈〉々〇",
    "한국어 고래가 노래한다 ㄱㄴ",
    "ภาษาไทย น้ำ ที่นี่ ๑๒๓ ไม้เอก",
    "हिन्दी क्षत्रिय भाषा", "العَرَبِيَّة ١٢٣ مرحبا", "עִבְרִית שלום",
    "🐋 🐳🐋 👩‍👩‍👧‍👦 🇳🇴 ☃️ ❤️‍🔥 1️⃣ :-) x🐋y 🐋123",
    "e\u0301 n\u0303 a\u0308o \u0301alone Zalgo\u0335\u0336",
    "İstanbul ıI ſ'ſ K'S 'ſ x'ſ",
    "don't DON'T dOn'T o'clock y'all's 've 'll's '' ''' 's'",
    "  a\n\n  b \n c\u2029d\u0085e\x0bf\x0cg\x1ch",
    "Привет, МИР! Ёлка ёж, їжак; Ελληνικά ΑΒΓ; Հայերեն; ქართული ᲥᲐᲠ",
    "a_b __init__ _x x_ --flag -x=1 @user #tag 100% C++ C# a/b\\c e-mail@x.org",
    "!a !!a .NET (word) [x] \"q\" 'q' /path/to\n//x\n;;\n",
    "ʕʔ ªº ˈfoʊ ʰ ʼ ꞉ 𝒜𝔅 𐐀𐐨 𞤀𞤢 ａＢ１ ！～",
]


def patterns(source):
    """The patterns of each kind of cut; where a comment has the published one, that."""
    out, kinds, found, published = {}, [], [], None
    # llama.cpp's engine has no flag for this
    adapted, contractions = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    for line in source[source.index("struct llm_tokenizer_bpe"):source.index("struct llm_tokenizer_bpe_session")].split("\n"):
        case = re.match(r"\s*(?:case LLAMA_VOCAB_PRE_TYPE_(\w+)|default):", line)
        text = re.match(r'\s*(// ?)?"((?:[^"\\]|\\.)*)"', line)
        if case:
            kinds.append(case[1] or "DEFAULT")
        elif "break;" in line:
            out |= {kind: found for kind in kinds}
            kinds, found, published = [], [], None
        elif text:
            pattern = json.loads(f'"{text[2]}"')
            if text[1]:
                published = pattern
            else:
                found.append(published or pattern.replace(adapted, contractions))
                published = None
    return out


def names(source):
    """The kind of cut of each name."""
    out, waiting = {}, []
    for match in re.finditer(r'tokenizer_pre == "([^"]+)"|pre_type = LLAMA_VOCAB_PRE_TYPE_(\w+);', source):
        if match[1]:
            waiting.append(match[1])
        else:
            out |= {name: match[2] for name in waiting}
            waiting = []
    return out


def cut(pieces, pattern):
    out = []
    for piece in pieces:
        at = 0
        for match in regex.finditer(pattern, piece, regex.V1):
            if match.end() == match.start():
                continue
            out += [piece[at:match.start()]] if match.start() > at else []
            out.append(match[0])
            at = match.end()
        out += [piece[at:]] if at < len(piece) else []
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    source = (args.folder / "src/llama-vocab.cpp").read_text()
    kinds, of = patterns(source), names(source)
    ours = (ROOT / "crates/minke-data/src/gguf/tokenizer/pre.rs").read_text()
    ours = ours[ours.index("const NAMES"):ours.index("/// The cut that a name stands for")]
    cuts = {}
    for name in re.findall(r'"([^"]+)"', ours):
        found = [KIMI] if name == "kimi-k2" else kinds[of[name]]
        told = []
        for text in TEXTS:
            pieces = [text] if text else []
            for pattern in found:
                pieces = cut(pieces, pattern)
            told.append(pieces)
        cuts[name] = told
    # a line for each name
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(told, ensure_ascii=False)}" for name, told in cuts.items())
    texts = json.dumps(TEXTS, ensure_ascii=False)
    args.out.write_text(f'{{"texts": {texts},\n"cuts": {{\n{lines}\n}}}}\n')
    print(f"{args.out}: {len(cuts)} names x {len(TEXTS)} texts")


if __name__ == "__main__":
    main()
