//! Bounds on what a template builds.
//!
//! Fuel bounds the steps of a template, but one step can join two texts of any length: forty steps make more text than
//! there is memory. So before a template is compiled, it is rewritten: what operators, filters and slices take, and what
//! `set` stores, passes through a filter that hands it on and charges its size to a budget of the rendering. Text between
//! tags is charged too, since a loop inside a macro or a `set` block gathers it in memory.
//!
//! ```text
//! {{ a ~ b }}  {{ a + b }}    {{ a|bound_text ~ b|bound_text }}  {{ a|bound_sum + b|bound_sum }}
//! {{ a * n }}  {{ a == b }}   {{ a|bound_factor * n|bound_factor }}  {{ a|bound_walk == b|bound_walk }}
//! {{ a|upper }}  {{ a[1:] }}  {{ a|bound_read|upper }}  {{ (a|bound_read)[1:] }}
//! {% set x = e %}             {% set x = (e)|bound_set %}
//! {% set ns.x = e %}          {% set ns.x = (e)|bound_keep %}
//! {% else %}some text         {% else %}{% if 9|bound_raw %}{% endif %}some text
//! ```
//!
//! Methods and functions charge for themselves. A single text may not be longer than any prompt, so a step takes no more
//! than moments, and whatever charges looks at the clock, too: every pass of a loop and every call of a macro does.
//!
//! A namespace is the only value that can change, so it is the only way to a value that holds itself; what is stored in
//! one holds no namespace, and is not nested deeply.

use std::cell::Cell;
use std::fmt::Write;
use std::time::{Duration, Instant};

use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Value};

use super::python::{self, MAX_DEPTH};

/// Bytes that a rendering may build however little it was given.
const BUDGET_BYTES: usize = 192 << 20;
/// And for each byte that it was given: an honest template may copy all of the conversation so far at each turn.
const BUDGET_PER_BYTE: usize = 1000;
/// Bytes of a single text however little was given, and for each byte that was: the whole conversation, escaped.
const TEXT_BYTES: usize = 1 << 20;
const TEXT_PER_BYTE: usize = 8;
/// An honest rendering takes milliseconds.
const MAX_TIME: Duration = Duration::from_secs(10);
/// A value beside its text.
pub(super) const VALUE_BYTES: usize = 24;
/// Times that a text is repeated at most without being charged for it.
const REPEATS: usize = 10_000;
const KEYWORDS: [&str; 9] = ["and", "or", "not", "in", "is", "if", "else", "set", "elif"];
/// Filters that read a text once and of a list no more than a few items, or charge for these themselves.
const READING: [&str; 34] = [
    "abs",
    "attr",
    "batch",
    "bool",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "e",
    "escape",
    "first",
    "float",
    "format",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "replace",
    "round",
    "safe",
    "slice",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "upper",
];
/// Filters that hand on items of a list as they are.
const CHOOSING: [&str; 6] = ["reject", "rejectattr", "reverse", "select", "selectattr", "wordcount"];
/// Tests that read all of a value.
const COMPARING: [&str; 14] = [
    "endingwith",
    "eq",
    "equalto",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "le",
    "lessthan",
    "lower",
    "lt",
    "ne",
    "startingwith",
    "upper",
];

thread_local! {
    /// What is left to the rendering of this thread.
    static BUDGET: Cell<usize> = const { Cell::new(0) };
    /// The longest text that it may make.
    static LONGEST: Cell<usize> = const { Cell::new(0) };
    /// When it is stopped.
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Begins a rendering of so many bytes on a thread of its own.
pub(super) fn begin(given_bytes: usize) {
    BUDGET.set(BUDGET_BYTES.saturating_add(given_bytes.saturating_mul(BUDGET_PER_BYTE)));
    LONGEST.set(TEXT_BYTES.saturating_add(given_bytes.saturating_mul(TEXT_PER_BYTE)));
    DEADLINE.set(Instant::now().checked_add(MAX_TIME));
}

/// Takes bytes off what is left.
///
/// # Errors
/// There is not so much left, or no time.
pub(super) fn charge(bytes: usize) -> Result<(), Error> {
    if DEADLINE.get().is_some_and(|deadline| Instant::now() > deadline) {
        return Err(fail("it takes longer than a prompt should"));
    }
    let left = BUDGET.get().checked_sub(bytes);
    BUDGET.set(left.unwrap_or(0));
    left.map(|_| ()).ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, "it builds more text and lists than a prompt can be made of")
    })
}

/// Takes the bytes of a text off what is left.
///
/// # Errors
/// There is not so much left, or the text is too long.
pub(super) fn charge_text(text: &str) -> Result<(), Error> {
    if text.len() > LONGEST.get() {
        return Err(fail("it builds a text that is longer than a prompt can be"));
    }
    charge(text.len())
}

/// The items of a value, charged one by one: nobody knows before how many there are.
///
/// # Errors
/// It has none, or too many.
pub(super) fn items(value: &Value) -> Result<Vec<Value>, Error> {
    value.try_iter()?.map(|item| charge(VALUE_BYTES).map(|()| item)).collect()
}

/// Charges a result by its outer size.
///
/// # Errors
/// It is too large.
pub(super) fn charge_result(value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => charge_text(text),
        None => charge(value.len().unwrap_or(0).saturating_mul(VALUE_BYTES)),
    }
}

fn fail(why: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

/// Adds the filters that [`rewritten`] puts into tags.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("bound_text", |value: Value| -> Result<Value, Error> {
        // what `~` makes of a value that is no text
        let text = if value.as_str().is_some() { value } else { Value::from(python::text(&value)?) };
        charge_text(text.as_str().unwrap_or_default())?;
        Ok(text)
    });
    environment.add_filter("bound_sum", |value: Value| charge_result(&value).map(|()| value));
    environment.add_filter("bound_read", |value: Value| {
        charge_text(value.as_str().unwrap_or_default()).map(|()| value)
    });
    environment.add_filter("bound_items", |value: Value| -> Result<Value, Error> {
        // a text gives its characters
        charge(value.as_str().map_or(0, str::len).saturating_mul(VALUE_BYTES))?;
        charge_result(&value).map(|()| value)
    });
    environment.add_filter("bound_walk", |value: Value| walk(&value, 0, false).map(|()| value));
    environment.add_filter("bound_all", |value: Value| -> Result<Value, Error> {
        charge(value.as_str().map_or(0, str::len).saturating_mul(VALUE_BYTES))?;
        walk(&value, 0, true).map(|()| value)
    });
    // false, so that what stands behind it is never anything
    environment.add_filter("bound_raw", |bytes: usize| charge(bytes).map(|()| false));
    environment.add_filter("bound_factor", |value: Value| -> Result<Value, Error> {
        match value.kind() {
            ValueKind::String => {
                let text = value.as_str().unwrap_or_default();
                charge_text(text)?;
                charge(text.len().saturating_mul(REPEATS))?;
            }
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
            ValueKind::Iterable => Value::from_object(items(&value)?),
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
    charge_text(value.as_str().unwrap_or_default())?;
    charge(VALUE_BYTES)?;
    if depth > MAX_DEPTH {
        return Err(fail("lists are nested too deeply"));
    }
    if is_namespace(value) {
        let why = fail("a namespace cannot be stored in another");
        return if is_kept { Err(why) } else { Ok(()) };
    }
    match value.kind() {
        ValueKind::Seq => value.try_iter()?.try_for_each(|item| walk(&item, depth + 1, is_kept)),
        // part of a list, or several: a view of items that are charged where they are kept
        ValueKind::Iterable => value.try_iter()?.try_for_each(|_| charge(VALUE_BYTES)),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| {
            walk(&key, depth + 1, is_kept)?;
            walk(&value.get_item(&key)?, depth + 1, is_kept)
        }),
        _ => Ok(()),
    }
}

/// A template whose tags and texts are bounded; none where a tag is no tag.
///
/// The tag of transformers that marks what the model wrote is made `{% if true %}`; here that is found otherwise.
pub(super) fn rewritten(source: &str) -> Option<String> {
    let mut out = String::with_capacity(source.len() * 2);
    // the first text is written once; white space before the first tag must stay at the begin of the template
    let (mut rest, mut charge) = (source, None);
    while let Some(at) = find_tag(rest) {
        put_text(&rest[..at], charge, &mut out);
        let tag = &rest[at..];
        let length = if let Some(comment) = tag.strip_prefix("{#") {
            let end = comment.find("#}")?;
            out.push_str(&tag[..end + 4]);
            let inside = comment[..end].strip_prefix(['-', '+']).unwrap_or(&comment[..end]);
            charge = Some(Charge { trim: trim(inside, ""), each_pass: false });
            end + 4
        } else {
            let close = if tag.starts_with("{{") { "}}" } else { "%}" };
            let (tokens, end) = tokens(&tag[2..], close)?;
            let inside = &tag[2..2 + end];
            let words: Vec<&str> =
                tokens.iter().filter(|t| t.kind == Kind::Word).map(|t| t.text).take(2).collect();
            let word = if close == "%}" { words.first().copied().unwrap_or_default() } else { "" };
            let length = end + 4;
            if word == "raw" && words.len() == 1 {
                // all up to the tag that ends it is a text, charged before it; that tag is copied like any other
                let trims = inside.starts_with(['-', '+']);
                let text = raw_end(&tag[length..])?;
                let _ =
                    write!(out, "{{%{} if {text}|bound_raw %}}{{% endif %}}", &inside[..usize::from(trims)]);
                out.push_str(&tag[..length + text]);
                (rest, charge) = (&tag[length + text..], None);
                continue;
            }
            out.push_str(&tag[..2]);
            match (word, words.len()) {
                ("generation", 1) => out.push_str(&inside.replacen("generation", "if true", 1)),
                ("endgeneration", 1) => out.push_str(&inside.replacen("endgeneration", "endif", 1)),
                _ => bound(inside, &tokens, word, &mut out),
            }
            out.push_str(close);
            // a tag of a value takes no line end with it
            let trim = trim(inside, if close == "}}" { "+" } else { "" });
            charge = Some(Charge { trim, each_pass: matches!(word, "for" | "macro" | "call") });
            length
        };
        rest = &tag[length..];
    }
    put_text(rest, charge, &mut out);
    Some(out)
}

/// What is charged for a text behind a tag.
#[derive(Clone, Copy)]
struct Charge {
    /// How the tag treats white space behind it.
    trim: &'static str,
    /// Whether it is charged even for no text, since what is behind it is done many times.
    each_pass: bool,
}

fn put_text(text: &str, charge: Option<Charge>, out: &mut String) {
    if let Some(Charge { trim, each_pass }) = charge
        && (each_pass || !text.is_empty())
    {
        // text cannot fail to grow
        let _ = write!(out, "{{% if {}|bound_raw %}}{{% endif {trim}%}}", text.len());
    }
    out.push_str(text);
}

/// How the inside of a tag ends: the sign of white-space control, or what stands for none.
fn trim(inside: &str, none: &'static str) -> &'static str {
    match inside.as_bytes().last() {
        Some(b'-') => "-",
        Some(b'+') => "+",
        _ => none,
    }
}

/// Where the next tag or comment begins.
fn find_tag(text: &str) -> Option<usize> {
    text.as_bytes().windows(2).position(|two| matches!(two, b"{{" | b"{%" | b"{#"))
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

    fn is_word(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text == word
    }

    fn compares(&self) -> bool {
        let is_operator = matches!(self.text, "==" | "!=" | "<" | ">" | "<=" | ">=");
        self.kind == Kind::Operator && is_operator || self.is_word("in")
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
fn bound(inside: &str, tokens: &[Token<'_>], word: &str, out: &mut String) {
    // white-space control stands at the border of a tag and is no operator
    let trims = |token: &Token<'_>| matches!(token.text, "-" | "+") && token.kind == Kind::Operator;
    let last_trims = tokens.last().is_some_and(|last| trims(last) && last.begin + 1 == inside.len());
    let first = usize::from(tokens.first().is_some_and(|first| trims(first) && first.begin == 0));
    let end = tokens.len() - usize::from(last_trims && tokens.len() > first);
    let stop = if last_trims { inside.len() - 1 } else { inside.trim_end().len() };
    let place = |index: usize| if index < end { tokens[index].begin } else { stop };
    // what is put where; of several in one place, in this order
    let mut puts: Vec<(usize, &str)> = Vec::new();
    // `in` of a loop is no operator
    let loops = if word == "for" { tokens.iter().position(|token| token.is_word("in")) } else { None };
    for at in first + 1..end {
        let (before, token) = (&tokens[at - 1], &tokens[at]);
        if token.is_word("in") && before.is_word("not") && at > first + 1 {
            puts.push((before.begin, "|bound_walk "));
        }
        if !(before.ends_operand() || token.is_word("in") && before.is_word("not")) {
            continue;
        }
        let name = |at: usize| tokens[..end].get(at).map_or("", |token| token.text);
        if token.is("~") {
            puts.push((token.begin, "|bound_text "));
            let (to, plain) = operand_end(tokens, at + 1, end, false);
            let goes_on = to < end && tokens[to].is("~");
            if !goes_on && plain {
                puts.push((place(to), "|bound_text "));
            }
        } else if token.is("+") {
            puts.push((token.begin, "|bound_sum "));
            let (to, _) = operand_end(tokens, at + 1, end, true);
            // what `~` and `*` take is charged there
            let goes_on = to < end && ["+", "~", "*"].iter().any(|operator| tokens[to].is(operator));
            if !goes_on && to > at + 1 {
                puts.push((place(to), "|bound_sum "));
            }
        } else if token.is("*") {
            puts.push((token.begin, "|bound_factor "));
            let (to, _) = operand_end(tokens, at + 1, end, true);
            let goes_on = to < end && tokens[to].is("*");
            if !goes_on {
                puts.push((place(to), "|bound_factor "));
            }
        } else if token.compares() && Some(at) != loops {
            if before.ends_operand() {
                puts.push((token.begin, "|bound_walk "));
            }
            let (to, _) = operand_end(tokens, at + 1, end, true);
            if to > at + 1 {
                puts.push((place(to), "|bound_walk "));
            }
        } else if token.is_word("is") {
            if COMPARING.contains(&name(at + 1 + usize::from(name(at + 1) == "not"))) {
                puts.push((token.begin, "|bound_walk "));
            }
        } else if token.is("|") {
            let is_view = name(at + 1) == "map" && name(at + 3) == "attribute";
            puts.push(match name(at + 1) {
                name if READING.contains(&name) => (token.begin, "|bound_read "),
                name if is_view || CHOOSING.contains(&name) => (token.begin, "|bound_items "),
                _ => (token.begin, "|bound_all "),
            });
        } else if token.is("[")
            && is_slice(&tokens[at..end])
            && let begin = operand_begin(&tokens[..at], first)
            // the operand of a test takes no parentheses, and leaves nothing behind
            && !(begin > first && tokens[begin - 1].kind == Kind::Word && tokens[begin - 1].ends_operand())
        {
            puts.push((tokens[begin].begin, "("));
            puts.push((token.begin, "|bound_read)"));
        }
    }
    if word == "set"
        && let Some(equals) = set_value(tokens, end)
    {
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

/// Whether the tokens of a subscript, from its bracket on, are a slice.
fn is_slice(tokens: &[Token<'_>]) -> bool {
    let mut depth = 0_usize;
    for token in tokens {
        if token.opens() {
            depth += 1;
        } else if token.closes() {
            depth -= 1;
            if depth == 0 {
                return false;
            }
        } else if depth == 1 && token.is(":") {
            return true;
        }
    }
    false
}

/// Where the operand begins that tokens end with: names, calls and subscripts behind one another.
fn operand_begin(tokens: &[Token<'_>], first: usize) -> usize {
    let mut at = tokens.len() - 1;
    loop {
        let mut depth = 0_usize;
        // to where a group opens
        loop {
            if tokens[at].closes() {
                depth += 1;
            } else if tokens[at].opens() {
                depth = depth.saturating_sub(1);
            }
            if depth == 0 || at == first {
                break;
            }
            at -= 1;
        }
        if at <= first + 1 {
            return at;
        }
        if tokens[at - 1].is(".") {
            at -= 2;
        } else if tokens[at].opens() && tokens[at - 1].ends_operand() && !tokens[at].is("{") {
            at -= 1;
        } else {
            return at;
        }
    }
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
            ("{{ a + 'x' }}", "{{ a |bound_sum + 'x'|bound_sum  }}"),
            ("{{ a + b + c }}", "{{ a |bound_sum + b |bound_sum + c|bound_sum  }}"),
            ("{{ a == -b and c }}", "{{ a |bound_walk == -b |bound_walk and c }}"),
            ("{{ a not in (b) }}", "{{ a |bound_walk not in (b)|bound_walk  }}"),
            (
                "{% for x in y if x in z %}",
                "{% for x in y if x |bound_walk in z|bound_walk  %}{% if 0|bound_raw %}{% endif %}",
            ),
            ("{{ a is not defined or b is eq c }}", "{{ a is not defined or b |bound_walk is eq c }}"),
            (
                "{{ a|upper|map('e')|select }}",
                "{{ a|bound_read |upper|bound_all |map('e')|bound_items |select }}",
            ),
            ("{{ -a.b(c)[d][1:][e] }}", "{{ -(a.b(c)[d]|bound_read)[1:][e] }}"),
            (
                "{{ a[:1] ~ [b[::2]] }}",
                "{{ (a|bound_read)[:1] |bound_text ~ [(b|bound_read)[::2]]|bound_text  }}",
            ),
            ("{{ {'a': [1, 2]}['a'] }}", "{{ {'a': [1, 2]}['a'] }}"),
            (
                "{{ a }}\n b{% if a -%} c {#- d -#} e",
                "{{ a }}{% if 3|bound_raw %}{% endif +%}\n b{% if a -%}{% if 3|bound_raw %}{% endif -%} c {#- d -#}{% if 2|bound_raw %}{% endif -%} e",
            ),
            ("{{ +a }}{{ f(-1, 1e+5, *x) }}", "{{ +a }}{{ f(-1, 1e+5, *x) }}"),
            ("{{ a * -b }}", "{{ a |bound_factor * -b|bound_factor  }}"),
            ("{{ a ~ b * 2 }}", "{{ a |bound_text ~ b |bound_factor * 2|bound_factor  }}"),
            ("{{ f(a ~ b, c) }}", "{{ f(a |bound_text ~ b|bound_text , c) }}"),
            (
                "{{ a ~ b.c[d]|e(f) if g else h }}",
                "{{ a |bound_text ~ b.c[d]|bound_read |e(f) |bound_text if g else h }}",
            ),
            ("{% set x = 1, 2 -%}", "{% set x =( 1, 2 )|bound_set -%}"),
            ("{%- set ns.x = {'a': '}}'} %}", "{%- set ns.x =( {'a': '}}'})|bound_keep  %}"),
            ("{% set x %}a = b{% endset %}", "{% set x %}{% if 5|bound_raw %}{% endif %}a = b{% endset %}"),
            ("{{ {'a': {'b': 1}} }}", "{{ {'a': {'b': 1}} }}"),
            (
                "{% raw %}{{ a ~ b }}{% endraw %}{{ a+b }}",
                "{% if 11|bound_raw %}{% endif %}{% raw %}{{ a ~ b }}{% endraw %}{{ a|bound_sum +b|bound_sum  }}",
            ),
            (
                "{%- generation -%}x{% endgeneration %}",
                "{%- if true -%}{% if 1|bound_raw %}{% endif -%}x{% endif %}",
            ),
            ("{%+ if a == b +%}", "{%+ if a |bound_walk == b |bound_walk +%}"),
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
