//! Chat templates as transformers renders them; `scripts/template_vectors.py` makes the vectors.

use minke_data::{ChatTemplate, Message, RenderOptions};
use serde_json::{Map, Value, json};

fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/templates.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

/// 64-bit FNV-1a.
fn fnv(text: &str) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

/// What a template gives, in the form of the vectors.
fn told(template: &ChatTemplate, options: &Value) -> (Value, String) {
    let mut variables: Map<String, Value> = options.as_object().unwrap().clone();
    let messages = variables.remove("messages").unwrap();
    let tools = variables.remove("tools").unwrap_or_default();
    variables.extend(variables.get("extra").and_then(Value::as_object).cloned().unwrap_or_default());
    match template.render_values(&list(&messages), &list(&tools), &variables) {
        Ok(text) => (json!([text.len(), fnv(&text)]), text),
        Err(error) => (Value::Null, error.to_string()),
    }
}

/// Snippets that are told otherwise on purpose, and why.
const OTHERWISE: [(&str, &str); 11] = [
    ("{{ xs }} {{ names }} {{ [] }} {{ {} }} {{ (1, 2) }} {{ (1,) }}", "a tuple is written as a list"),
    ("{{ 'a=b=c'.partition('=') }}|{{ 'a=b=c'.rpartition('=') }}|{{ 'a'.partition('=') }}", "the same"),
    (
        "{{ d.items() | list }}|{{ d.keys() | list }}|{{ d.values() | list }}|{{ d | items | list }}|{{ d.get('zz') }}|\
         {{ d.get('zz', 4) }}|{{ d.get('b') }}",
        "the same",
    ),
    ("{{ {1: 'a', true: 'b'} | tojson }}", "1 and true are two keys"),
    ("{{ '%s is %d' % ('a', 3) }}", "`%` formats nothing; the filter `format` does"),
    ("{% for x in n %}x{% endfor %}|", "nothing is gone through like an empty list"),
    (
        "{{ 1234567 | filesizeformat }}|{{ 'a b&c' | urlencode }}|{{ '<b>x</b>' | striptags }}",
        "no prompt needs them",
    ),
    (
        "{% macro m(a, b='q') %}[{{ a }}{{ b }}{{ varargs is defined }}]{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}\
         {{ m('x', 'y') }}",
        "macros have no `varargs`",
    ),
    ("{{ namespace(_x=1) }}", "there is no Python to protect"),
    (
        "{{ -xs[0] }}|{{ not true or true }}|{{ 2 + 3 * 2 }}|{{ '3' * 2 }}|{{ not 1 in xs }}",
        "`-xs[0]` negates `xs`",
    ),
    (
        "{{ lipsum is defined }}{{ cycler is defined }}{{ joiner is defined }}{{ range is defined }}{{ self is defined }}",
        "no `lipsum`",
    ),
];

#[test]
fn jinja_and_python_mean_here_what_they_mean_there() {
    let vectors = vectors();
    let mut wrong = Vec::new();
    for pair in vectors["snippets"].as_array().unwrap() {
        let (source, told) = (pair[0].as_str().unwrap(), pair[1].as_str());
        let variables = vectors["variables"].as_object().unwrap();
        let got = ChatTemplate::new("t", source)
            .and_then(|template| template.render_values(&list(&variables["messages"]), &[], variables));
        let is_same = match (&got, told) {
            (Ok(got), Some(told)) => got == told,
            (Err(_), None) => true,
            _ => false,
        };
        if !is_same && !OTHERWISE.iter().any(|(known, _)| *known == source) {
            wrong.push(format!("{source}\n  there {told:?}\n  here  {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of them:\n{}", wrong.len(), wrong.join("\n"));
}

/// The text of a template: from the vectors, or where its licence forbids that, from a folder of templates.
fn source(entry: &Value) -> Option<String> {
    if let Some(source) = entry["source"].as_str() {
        return Some(source.to_owned());
    }
    let folder = std::env::var_os("MINKE_TEMPLATES")?;
    let path = std::path::Path::new(&folder).join(format!("{}.jinja", entry["name"].as_str().unwrap()));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(json!([text.len(), fnv(&text)]), entry["text"], "{}: another version", path.display());
    Some(text)
}

#[test]
fn published_templates_give_what_transformers_gives() {
    let vectors = vectors();
    let mut count = 0;
    for entry in vectors["templates"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let Some(source) = source(entry) else {
            println!("{name}: skipped, since MINKE_TEMPLATES names no folder of templates");
            continue;
        };
        let template = ChatTemplate::new(name, &source).unwrap();
        let template = template.with_names(&entry["tokens"]);
        for (case, options) in vectors["cases"].as_object().unwrap() {
            let (hash, text) = told(&template, options);
            assert_eq!(hash, entry["told"][case], "{name}, {case}: {text}");
            count += 1;
        }
    }
    assert!(count > 150, "{count}");
}

#[test]
fn templates_get_calls_in_the_form_that_they_want() {
    let vectors = vectors();
    let of = |case: &str| vectors["cases"][case].clone();
    for entry in vectors["templates"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let Some(source) = source(entry) else { continue };
        let template = ChatTemplate::new(name, &source).unwrap();
        let template = template.with_names(&entry["tokens"]);
        for kind in ["call", "result"] {
            let forms = ["object", "object-null", "text", "text-null"].map(|form| format!("{kind}-{form}"));
            let texts: Vec<String> = forms
                .iter()
                .filter(|case| !entry["told"][case.as_str()].is_null())
                .map(|case| told(&template, &of(case)).1)
                .filter(|text| {
                    text.contains("minke") && !text.contains(r#"\"animal\""#) && text.contains("depth")
                })
                .collect();
            for case in &forms {
                // however the call was given
                let messages: Vec<Message> = serde_json::from_value(of(case)["messages"].clone()).unwrap();
                let tools = list(&of(case)["tools"]);
                let add = of(case)["add_generation_prompt"] == true;
                let options =
                    RenderOptions { tools: &tools, add_generation_prompt: add, ..RenderOptions::default() };
                let got = template.render(&messages, options);
                match got {
                    Ok(got) => {
                        assert!(texts.is_empty() || texts.contains(&got), "{name}, {case}: {got}\n{texts:?}");
                    }
                    Err(error) => assert!(texts.is_empty(), "{name}, {case}: {error}"),
                }
            }
        }
    }
}
