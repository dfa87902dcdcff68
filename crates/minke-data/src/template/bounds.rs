//! Bounds on what a template builds.
//!
//! Fuel bounds the steps of a template, but one step can join two texts of any length: forty steps make more text than
//! there is memory. So before a template is compiled, its tags are rewritten: what `~`, `+` and `*` take, and what `set`
//! stores, passes through a filter that hands it on and charges its size to a budget of the rendering.
//!
//! ```text
//! {{ a ~ b + c * n }}     {{ a|bound_text ~ b|bound_text|bound_sum + c|bound_factor * n|bound_factor }}
//! {% set x = e %}         {% set x = (e)|bound_set %}
//! {% set ns.x = e %}      {% set ns.x = (e)|bound_keep %}
//! ```
//!
//! A namespace is the only value that can change, so it is the only way to a value that holds itself; what is stored in
//! one holds no namespace, and is not nested deeply.

use std::cell::Cell;

use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Value};

use super::python::{self, MAX_DEPTH};

/// Bytes that a rendering may build however little it was given.
const BUDGET_BYTES: usize = 192 << 20;
/// And for each byte that it was given: an honest template may copy all of the conversation so far at each turn.
const BUDGET_PER_BYTE: usize = 1000;
/// A value beside its text.
const VALUE_BYTES: usize = 24;
/// Times that a text is repeated at most without being charged for it.
const REPEATS: usize = 10_000;
const KEYWORDS: [&str; 9] = ["and", "or", "not", "in", "is", "if", "else", "set", "elif"];

thread_local! {
    /// What is left to the rendering of this thread.
    static BUDGET: Cell<usize> = const { Cell::new(0) };
}

/// Begins a rendering of so many bytes on a thread of its own.
pub(super) fn begin(given_bytes: usize) {
    BUDGET.set(BUDGET_BYTES.saturating_add(given_bytes.saturating_mul(BUDGET_PER_BYTE)));
}

/// Takes bytes off what is left.
///
/// # Errors
/// There is not so much left.
pub(super) fn charge(bytes: usize) -> Result<(), Error> {
    let left = BUDGET.get().checked_sub(bytes);
    BUDGET.set(left.unwrap_or(0));
    left.map(|_| ()).ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, "it builds more text and lists than a prompt can be made of")
    })
}

fn fail(why: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

/// Adds the filters that [`rewritten`] puts into tags.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("bound_text", |value: Value| -> Result<Value, Error> {
        // what `~` makes of a value that is no text
        let text = if value.as_str().is_some() { value } else { Value::from(python::text(&value)?) };
        charge(text.as_str().map_or(0, str::len))?;
        Ok(text)
    });
    environment.add_filter("bound_sum", |value: Value| -> Result<Value, Error> {
        charge(match value.as_str() {
            Some(text) => text.len(),
            None if value.kind() == ValueKind::Seq => value.len().unwrap_or(0).saturating_mul(VALUE_BYTES),
            None => 0,
        })?;
        Ok(value)
    });
    environment.add_filter("bound_factor", |value: Value| -> Result<Value, Error> {
        match value.kind() {
            ValueKind::String => charge(value.as_str().map_or(0, str::len).saturating_mul(REPEATS))?,
            ValueKind::Seq => {
                walk(&value, 0, true)?;
                charge(value.len().unwrap_or(0).saturating_mul(REPEATS))?;
            }
            ValueKind::Number => {
                let times = value.as_usize().unwrap_or(0);
                charge(if times > REPEATS && times < 1 << 30 { times } else { 0 })?;
            }
            _ => {}
        }
        Ok(value)
    });
    environment.add_filter("bound_set", |value: Value| -> Result<Value, Error> {
        if !is_namespace(&value) {
            walk(&value, 0, false)?;
        }
        Ok(value)
    });
    environment.add_filter("bound_keep", |value: Value| -> Result<Value, Error> {
        let value = match value.kind() {
            ValueKind::Iterable => Value::from_object(value.try_iter()?.collect::<Vec<Value>>()),
            ValueKind::Plain => return Err(fail("a namespace holds no functions")),
            _ => value,
        };
        walk(&value, 0, true)?;
        Ok(value)
    });
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("Namespace"))
}

/// Charges a value with all that it holds.
fn walk(value: &Value, depth: usize, is_kept: bool) -> Result<(), Error> {
    charge(VALUE_BYTES + value.as_str().map_or(0, str::len))?;
    if depth > MAX_DEPTH {
        return Err(fail("lists are nested too deeply"));
    }
    if is_namespace(value) {
        let why = fail("a namespace cannot be stored in another");
        return if is_kept { Err(why) } else { Ok(()) };
    }
    match value.kind() {
        ValueKind::Seq => value.try_iter()?.try_for_each(|item| walk(&item, depth + 1, is_kept)),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| {
            walk(&key, depth + 1, is_kept)?;
            walk(&value.get_item(&key)?, depth + 1, is_kept)
        }),
        _ => Ok(()),
    }
}

/// A template whose tags are bounded; none where a tag is no tag.
///
/// The tag of transformers that marks what the model wrote is made `{% if true %}`; here that is found otherwise.
pub(super) fn rewritten(source: &str) -> Option<String> {
    let mut out = String::with_capacity(source.len() + source.len() / 4);
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        if let Some(comment) = tag.strip_prefix("{#") {
            let end = comment.find("#}")? + 4;
            out.push_str(&tag[..end]);
            rest = &tag[end..];
        } else if tag.starts_with("{{") || tag.starts_with("{%") {
            let close = if tag.starts_with("{{") { "}}" } else { "%}" };
            let (tokens, end) = tokens(&tag[2..], close)?;
            let inside = &tag[2..2 + end];
            let words: Vec<&str> =
                tokens.iter().filter(|t| t.kind == Kind::Word).map(|t| t.text).take(2).collect();
            out.push_str(&tag[..2]);
            match &words[..] {
                ["generation"] if close == "%}" => out.push_str(&inside.replacen("generation", "if true", 1)),
                ["endgeneration"] if close == "%}" => {
                    out.push_str(&inside.replacen("endgeneration", "endif", 1));
                }
                _ => bound(inside, &tokens, close == "%}" && words.first() == Some(&"set"), &mut out),
            }
            out.push_str(close);
            rest = &tag[2 + end + close.len()..];
            if close == "%}" && words == ["raw"] {
                // up to the tag that ends it, which is copied like any other
                let end = raw_end(rest)?;
                out.push_str(&rest[..end]);
                rest = &rest[end..];
            }
        } else {
            out.push('{');
            rest = &tag[1..];
        }
    }
    out.push_str(rest);
    Some(out)
}

fn raw_end(text: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + text[from..].find("{%")?;
        let inside = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        if inside.starts_with("endraw") {
            return Some(at);
        }
        from = at + 2;
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A name or a number.
    Word,
    Text,
    Operator,
}

/// A token of a tag: where it begins, and its text.
#[derive(Clone, Copy)]
struct Token<'a> {
    kind: Kind,
    begin: usize,
    text: &'a str,
}

impl Token<'_> {
    fn is(&self, operator: &str) -> bool {
        self.kind == Kind::Operator && self.text == operator
    }

    /// Whether an operand may end with it.
    fn ends_operand(&self) -> bool {
        match self.kind {
            Kind::Word => !KEYWORDS.contains(&self.text),
            Kind::Text => true,
            Kind::Operator => matches!(self.text, ")" | "]" | "}"),
        }
    }

    fn opens(&self) -> bool {
        self.kind == Kind::Operator && matches!(self.text, "(" | "[" | "{")
    }

    fn closes(&self) -> bool {
        self.kind == Kind::Operator && matches!(self.text, ")" | "]" | "}")
    }
}

/// The tokens of a tag up to its close, and where that is.
fn tokens<'a>(text: &'a str, close: &str) -> Option<(Vec<Token<'a>>, usize)> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let (mut at, mut braces) = (0, 0_usize);
    loop {
        let byte = *bytes.get(at)?;
        if text[at..].starts_with(close) && (close != "}}" || braces == 0) {
            return Some((tokens, at));
        }
        let begin = at;
        let kind = match byte {
            b' ' | b'\t' | b'\n' | b'\r' => {
                at += 1;
                continue;
            }
            b'\'' | b'"' => {
                at += 1;
                while *bytes.get(at)? != byte {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
                Kind::Text
            }
            b'0'..=b'9' => {
                let is_part = |at: usize| {
                    let byte = bytes[at];
                    byte.is_ascii_alphanumeric()
                        || byte == b'_'
                        || byte == b'.' && bytes.get(at + 1).is_some_and(u8::is_ascii_digit)
                        || matches!(byte, b'+' | b'-') && matches!(bytes[at - 1], b'e' | b'E')
                };
                while at < bytes.len() && is_part(at) {
                    at += 1;
                }
                Kind::Word
            }
            _ if byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80 => {
                while at < bytes.len()
                    && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_' || bytes[at] >= 0x80)
                {
                    at += 1;
                }
                Kind::Word
            }
            _ => {
                let two = text.get(at..at + 2).unwrap_or_default();
                at += if matches!(two, "**" | "//" | "==" | "!=" | "<=" | ">=") { 2 } else { 1 };
                match byte {
                    b'{' => braces += 1,
                    b'}' => braces = braces.checked_sub(1)?,
                    _ => {}
                }
                Kind::Operator
            }
        };
        tokens.push(Token { kind, begin, text: &text[begin..at] });
    }
}

/// Writes the inside of a tag with the filters in it.
fn bound(inside: &str, tokens: &[Token<'_>], is_set: bool, out: &mut String) {
    // white-space control stands at the border of a tag and is no operator
    let trims = |token: &Token<'_>| matches!(token.text, "-" | "+") && token.kind == Kind::Operator;
    let last_trims = tokens.last().is_some_and(|last| trims(last) && last.begin + 1 == inside.len());
    let first = usize::from(tokens.first().is_some_and(|first| trims(first) && first.begin == 0));
    let end = tokens.len() - usize::from(last_trims && tokens.len() > first);
    let stop = if last_trims { inside.len() - 1 } else { inside.trim_end().len() };
    let place = |index: usize| if index < end { tokens[index].begin } else { stop };
    // what is put where; of several in one place, in this order
    let mut puts: Vec<(usize, &str)> = Vec::new();
    for at in first + 1..end {
        let (before, token) = (&tokens[at - 1], &tokens[at]);
        if !before.ends_operand() {
            continue;
        }
        if token.is("~") {
            puts.push((token.begin, "|bound_text "));
            let (to, plain) = operand_end(tokens, at + 1, end, false);
            let goes_on = to < end && tokens[to].is("~");
            if !goes_on && plain {
                puts.push((place(to), "|bound_text "));
            }
        } else if token.is("+") {
            puts.push((token.begin, "|bound_sum "));
        } else if token.is("*") {
            puts.push((token.begin, "|bound_factor "));
            let (to, _) = operand_end(tokens, at + 1, end, true);
            let goes_on = to < end && tokens[to].is("*");
            if !goes_on {
                puts.push((place(to), "|bound_factor "));
            }
        }
    }
    if is_set && let Some(equals) = set_value(tokens, end) {
        puts.push((tokens[equals].begin + 1, "("));
        let keeps = tokens[..equals].iter().any(|token| token.is("."));
        puts.push((stop, if keeps { ")|bound_keep " } else { ")|bound_set " }));
    }
    puts.sort_by_key(|(place, _)| *place);
    let mut from = 0;
    for (place, text) in puts {
        out.push_str(&inside[from..place]);
        out.push_str(text);
        from = place;
    }
    out.push_str(&inside[from..]);
}

/// Where the operand that begins at a token ends, as the index of the token behind it, and whether it has no operators
/// of its own. The operand of a product ends at any operator, that of `~` holds products.
fn operand_end(tokens: &[Token<'_>], from: usize, end: usize, of_product: bool) -> (usize, bool) {
    let (mut depth, mut plain, mut at) = (0_usize, true, from);
    // signs
    while at < end && (tokens[at].is("-") || tokens[at].is("+")) {
        at += 1;
    }
    while at < end {
        let token = &tokens[at];
        if token.opens() {
            depth += 1;
        } else if token.closes() {
            let Some(outer) = depth.checked_sub(1) else { break };
            depth = outer;
        } else if depth == 0 {
            let is_keyword = token.kind == Kind::Word && KEYWORDS.contains(&token.text);
            let joins = matches!(token.text, "." | "|" | "[" | "(") && token.kind == Kind::Operator;
            let is_operator = token.kind == Kind::Operator && !joins;
            let is_product = is_operator && matches!(token.text, "*" | "/" | "//" | "%" | "**");
            if is_keyword || is_operator && (of_product || !is_product) {
                break;
            }
            plain &= !is_product;
        }
        at += 1;
    }
    (at, plain)
}

/// The `=` of a `set` that stores a value; a block has none.
fn set_value(tokens: &[Token<'_>], end: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, token) in tokens[..end].iter().enumerate() {
        if token.opens() {
            depth += 1;
        } else if token.closes() {
            depth = depth.saturating_sub(1);
        } else if depth == 0 && token.is("=") {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_bounded_and_text_is_left_alone() {
        let cases = [
            ("a ~ b {{ x }}{# a ~ b #}", "a ~ b {{ x }}{# a ~ b #}"),
            ("{{ a ~ b }}", "{{ a |bound_text ~ b|bound_text  }}"),
            ("{{- a~b~'c ~ d' -}}", "{{- a|bound_text ~b|bound_text ~'c ~ d' |bound_text -}}"),
            ("{{ a + 'x' }}", "{{ a |bound_sum + 'x' }}"),
            ("{{ +a }}{{ f(-1, 1e+5, *x) }}", "{{ +a }}{{ f(-1, 1e+5, *x) }}"),
            ("{{ a * -b }}", "{{ a |bound_factor * -b|bound_factor  }}"),
            ("{{ a ~ b * 2 }}", "{{ a |bound_text ~ b |bound_factor * 2|bound_factor  }}"),
            ("{{ f(a ~ b, c) }}", "{{ f(a |bound_text ~ b|bound_text , c) }}"),
            (
                "{{ a ~ b.c[d]|e(f) if g else h }}",
                "{{ a |bound_text ~ b.c[d]|e(f) |bound_text if g else h }}",
            ),
            ("{% set x = 1, 2 -%}", "{% set x =( 1, 2 )|bound_set -%}"),
            ("{%- set ns.x = {'a': '}}'} %}", "{%- set ns.x =( {'a': '}}'})|bound_keep  %}"),
            ("{% set x %}a = b{% endset %}", "{% set x %}a = b{% endset %}"),
            ("{{ {'a': {'b': 1}} }}", "{{ {'a': {'b': 1}} }}"),
            (
                "{% raw %}{{ a ~ b }}{% endraw %}{{ a+b }}",
                "{% raw %}{{ a ~ b }}{% endraw %}{{ a|bound_sum +b }}",
            ),
            ("{%- generation -%}x{% endgeneration %}", "{%- if true -%}x{% endif %}"),
            ("{%+ if a == b +%}", "{%+ if a == b +%}"),
            ("{ {é} }", "{ {é} }"),
        ];
        for (source, expected) in cases {
            assert_eq!(rewritten(source).as_deref(), Some(expected), "{source}");
        }
        for broken in ["{{ 'a }}", "{{ a", "{% raw %}x", "{# a", "{{ a } }}"] {
            assert_eq!(rewritten(broken), None, "{broken}");
        }
    }
}
