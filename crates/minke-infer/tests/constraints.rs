//! Constrained decoding: what a model whose weights are drawn at random must write, and what nobody may ask for.

use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use minke_cpu::Cpu;
use minke_data::{Tokenizer, TrainOptions};
use minke_infer::{
    Constraint, ConstraintError, Delta, Engine, EngineError, Generation, Request, Sampling, StopReason,
    ThinkingBudget,
};
use minke_model::{Config, DType, Model, Precision};
use serde_json::{Value, json};

fn tokenizer() -> Tokenizer {
    let sample =
        vec!["{\"name\": \"the whale\", \"age\": 42, \"sings\": true} ünder the wäve 鯨\n".repeat(20)];
    Tokenizer::train(&sample, &TrainOptions { vocab_size: 320, ..TrainOptions::default() }).unwrap()
}

/// A model whose weights are drawn, with more rows than the tokenizer has tokens, as padded tables have.
fn model(tokenizer: &Tokenizer) -> Model {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors/v3_plain");
    let text = std::fs::read_to_string(vectors.join("config.json")).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    value["vocab_size"] = (tokenizer.vocab_size() + 12).into();
    value["initializer_range"] = 0.3.into();
    value["max_position_embeddings"] = 2048.into();
    Model::random(Config::from_json(&value).unwrap(), Precision::uniform(DType::F32), 11)
}

fn silent(_: Delta<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn request(tokenizer: &Tokenizer, constraint: Constraint, sequence: u64) -> Request {
    Request {
        prompt: tokenizer.encode("Tell me of the whale.\n").unwrap(),
        max_tokens: 700,
        sampling: Sampling { seed: 7, ..Sampling::default() },
        sequence,
        stop_ids: tokenizer.eos().into_iter().collect(),
        constraint: Some(constraint),
        ..Request::default()
    }
}

/// Schemas whose instances are short.
fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "boolean"}),
        json!({"enum": ["cold", "warm", 3, null]}),
        json!({"type": "string", "maxLength": 8}),
        json!({"type": "string", "format": "date"}),
        json!({"type": "integer", "minimum": -20, "maximum": 300}),
        json!({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5}),
        json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 2, "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 200},
                "songs": {"type": "array", "items": {"enum": ["low", "high"]}, "maxItems": 3},
                "calf": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/calf"}]}
            },
            "required": ["name", "age", "calf"],
            "additionalProperties": false,
            "$defs": {
                "calf": {
                    "type": "object",
                    "properties": {"born": {"type": "string", "pattern": "^(19|20)[0-9]{2}$"}},
                    "required": ["born"],
                    "additionalProperties": false
                }
            }
        }),
    ]
}

#[test]
fn whatever_a_model_would_say_its_answer_satisfies_the_schema() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(2);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    for schema in schemas() {
        let validator = jsonschema::validator_for(&schema).unwrap();
        let mut requests: Vec<Request> = (0..6)
            .map(|sequence| request(&tokenizer, Constraint::JsonSchema(schema.clone()), sequence))
            .collect();
        // the mask and the filters together, the likeliest, and an end that only the grammar knows
        requests[1].sampling = Sampling { temperature: 1.5, top_k: 3, top_p: 0.7, ..requests[1].sampling };
        requests[2].sampling = Sampling { min_p: 0.3, typical_p: 0.8, ..requests[2].sampling };
        requests[3].sampling = Sampling { repetition_penalty: 1.5, ..Sampling::greedy() };
        requests[4].stop_ids.clear();
        let alone: Vec<Generation> = requests
            .iter()
            .map(|one| engine.generate(std::slice::from_ref(one), &mut silent).unwrap().remove(0))
            .collect();
        for generation in &alone {
            let ended = matches!(generation.stop, StopReason::Complete | StopReason::Token(_));
            assert!(ended, "{schema}: {:?} {}", generation.stop, generation.text);
            let value: Value = serde_json::from_str(&generation.text)
                .unwrap_or_else(|error| panic!("{schema}: {error} in {}", generation.text));
            assert!(validator.is_valid(&value), "{schema}: {value}");
        }
        assert_eq!(engine.generate(&requests, &mut silent).unwrap(), alone, "{schema}");
    }
}

#[test]
fn objects_regexes_and_grammars_are_kept_to() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(2);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let mut texts = |constraint: Constraint| -> Vec<String> {
        let requests: Vec<Request> =
            (0..8).map(|sequence| request(&tokenizer, constraint.clone(), sequence)).collect();
        let generations = engine.generate(&requests, &mut silent).unwrap();
        assert!(generations.iter().all(|one| one.stop != StopReason::DeadEnd));
        let ended = generations.into_iter().filter(|one| one.stop != StopReason::MaxTokens);
        ended.map(|one| one.text).collect()
    };
    let pattern = r"(ab|[0-9]{2,3})-[é鯨]{1,2}(x\.y)?";
    let regex = regex::Regex::new(&format!("^(?:{pattern})$")).unwrap();
    let found = texts(Constraint::Regex(pattern.to_owned()));
    assert_eq!(found.len(), 8);
    assert!(found.iter().all(|text| regex.is_match(text)), "{found:?}");
    let grammar = r#"
        start: sum
        sum: product ("+" product){0,2}
        product: NUMBER | "(" NUMBER "-" NUMBER ")"
        NUMBER: /[0-9]{1,3}/
    "#;
    let sum =
        regex::Regex::new(r"^(\d{1,3}|\(\d{1,3}-\d{1,3}\))(\+(\d{1,3}|\(\d{1,3}-\d{1,3}\))){0,2}$").unwrap();
    let found = texts(Constraint::Grammar(grammar.to_owned()));
    assert_eq!(found.len(), 8);
    assert!(found.iter().all(|text| sum.is_match(text)), "{found:?}");
    for text in texts(Constraint::JsonObject) {
        assert!(serde_json::from_str::<Value>(&text).unwrap().is_object(), "{text}");
    }
}

#[test]
fn a_thought_is_free_and_the_answer_is_not() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(2);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let schema = json!({"enum": ["cold", "warm"]});
    for (budget, close) in [(0, "\n</think>\n\n"), (9, "\n</think>\n\n"), (0, "</think>"), (9, "</think>")] {
        let request = Request {
            prompt: tokenizer.encode_with_special("how is it?<think>\n").unwrap(),
            thinking: Some(ThinkingBudget::new(budget).closed_by(close)),
            constrain_answer_only: true,
            ..request(&tokenizer, Constraint::JsonSchema(schema.clone()), 3)
        };
        let generation = engine.generate(std::slice::from_ref(&request), &mut silent).unwrap().remove(0);
        let (_, answer) = generation.text.split_once(close).unwrap();
        assert!(["\"cold\"", "\"warm\""].contains(&answer), "{:?}", generation.text);
        // and without the word for it the constraint is on from the start
        let strict = Request { constrain_answer_only: false, thinking: None, ..request };
        let generation = engine.generate(&[strict], &mut silent).unwrap().remove(0);
        assert!(["\"cold\"", "\"warm\""].contains(&&*generation.text), "{:?}", generation.text);
    }
}

/// Where the prompt leaves it to the model whether to think.
#[test]
fn an_answer_may_begin_with_a_thought_of_its_own() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(2);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let schema = Constraint::JsonSchema(json!({"enum": ["cold", "warm"]}));
    let mut write = |prompt: &str, budget: usize, bias: f32, constraint: &Constraint| {
        let prompt = tokenizer.encode_with_special(prompt).unwrap();
        let request = Request {
            thinking: Some(ThinkingBudget::new(budget)),
            constrain_answer_only: true,
            logit_bias: vec![(tokenizer.id_of("<think>").unwrap(), bias)],
            prompt,
            ..request(&tokenizer, constraint.clone(), 3)
        };
        let waits = minke_infer::form_waits(&tokenizer, &request.prompt, constraint, true);
        let generation = engine.generate(&[request], &mut silent).unwrap().remove(0);
        (waits, generation.text, generation.thought.unwrap().tokens)
    };
    let is_form = |text: &str| ["\"cold\"", "\"warm\""].contains(&text);
    for budget in [0, 9] {
        let (waits, text, tokens) = write("how is it?", budget, 100.0, &schema);
        let (thought, answer) = text.split_once("\n</think>\n\n").unwrap();
        assert!(waits && thought.starts_with("<think>") && is_form(answer) && tokens == budget, "{text:?}");
        // who does not think answers at once
        let (waits, text, tokens) = write("how is it?", budget, -100.0, &schema);
        assert!(waits && is_form(&text) && tokens == 0, "{text:?}");
        // and so does who was told not to
        let (waits, text, _) = write("how is it?<think>\n\n</think>\n\n", budget, 100.0, &schema);
        assert!(!waits && is_form(&text), "{text:?}");
        // a form that has marks keeps them
        let marked = Constraint::Regex("<think>a</think>".to_owned());
        let (waits, text, _) = write("how is it?", budget, 100.0, &marked);
        assert!(!waits && text == "<think>a</think>", "{text:?}");
    }
}

/// Where the template knows no thoughts the answer begins with none, but one that the prompt has begun ends first.
#[test]
fn a_form_waits_for_what_the_prompt_has_begun() {
    let tokenizer = tokenizer();
    let schema = Constraint::JsonSchema(json!({"enum": ["cold", "warm"]}));
    for (prompt, knows, expected) in [
        ("how is it?", false, false),
        ("how is it?", true, true),
        ("how is it?<think>\n", false, true),
        ("how is it?<think>\n", true, true),
        ("how is it?<think>\n\n</think>\n\n", true, false),
    ] {
        let prompt_ids = tokenizer.encode_with_special(prompt).unwrap();
        let waits = minke_infer::form_waits(&tokenizer, &prompt_ids, &schema, knows);
        assert_eq!(waits, expected, "{prompt:?}, known: {knows}");
    }
}

/// A thought that ends the answer would leave it without its form.
#[test]
fn an_answer_does_not_end_within_the_thought_that_its_form_waits_for() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(2);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let end = tokenizer.eos().unwrap();
    let thinking = Request {
        prompt: tokenizer.encode_with_special("how is it?<think>\n").unwrap(),
        thinking: Some(ThinkingBudget::new(9)),
        constrain_answer_only: true,
        // the model would end its answer wherever it may
        logit_bias: vec![(end, 100.0)],
        ..request(&tokenizer, Constraint::JsonSchema(json!({"enum": ["cold", "warm"]})), 3)
    };
    let generation = engine.generate(std::slice::from_ref(&thinking), &mut silent).unwrap().remove(0);
    let (_, answer) = generation.text.split_once("</think>\n\n").unwrap();
    assert!(["\"cold\"", "\"warm\""].contains(&answer), "{:?}", generation.text);
    // where the request itself names a token to stop at, it stops there
    let stopped = Request { stop_ids: Vec::new(), more_stop_ids: vec![end], ..thinking };
    let generation = engine.generate(&[stopped], &mut silent).unwrap().remove(0);
    assert_eq!(generation.stop, StopReason::Token(end));
}

#[test]
fn tokens_that_a_request_stops_at_may_be_text_of_its_form() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(2);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let seven = tokenizer.id_of("7").unwrap();
    let form = |regex: &str| request(&tokenizer, Constraint::Regex(regex.to_owned()), 3);
    let mut write = |request: Request| {
        let generation = engine.generate(&[request], &mut silent).unwrap().remove(0);
        (generation.text, generation.stop)
    };
    for (regex, text) in [("74", ""), ("a7b", "a")] {
        let stopping = Request { more_stop_ids: vec![seven], ..form(regex) };
        assert_eq!(write(stopping), (text.to_owned(), StopReason::Token(seven)), "{regex}");
        // of the model's own ends a form knows nothing
        assert_eq!(write(Request { stop_ids: vec![seven], ..form(regex) }).1, StopReason::DeadEnd, "{regex}");
    }
}

#[test]
fn marks_of_a_thought_are_text_where_a_form_has_them() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(2);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    for budget in [0, 1, 100] {
        let request = Request {
            thinking: Some(ThinkingBudget::new(budget)),
            constrain_answer_only: true,
            ..request(&tokenizer, Constraint::Regex("<think>a{3}</think>b".to_owned()), 3)
        };
        let generation = engine.generate(&[request], &mut silent).unwrap().remove(0);
        assert_eq!((&*generation.text, &generation.stop), ("<think>aaa</think>b", &StopReason::Complete));
    }
}

#[test]
fn what_is_wrong_is_said_and_what_is_hostile_takes_bounded_time() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(2);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let mut nested = json!({"type": "string"});
    for _ in 0..200 {
        nested = json!({"type": "array", "items": nested});
    }
    let wide: serde_json::Map<String, Value> =
        (0..20_000).map(|i| (format!("property number {i}"), json!({"type": "string"}))).collect();
    let mut doubling = String::new();
    for i in 0..60 {
        writeln!(doubling, "a{i}: a{0} a{0}", i + 1).unwrap();
    }
    let regex = |text: &str| Constraint::Regex(text.to_owned());
    let schema = Constraint::JsonSchema;
    let grammar = |text: String| Constraint::Grammar(text);
    let wrong = [
        schema(json!(3)),
        schema(json!({"type": "whale"})),
        schema(json!({"$ref": "https://example.com/schema.json"})),
        schema(json!({"$ref": "#/$defs/none"})),
        schema(json!({"type": "integer", "minimum": 3, "maximum": 1})),
        schema(nested),
        schema(json!({"type": "object", "properties": wide})),
        regex("(unclosed"),
        regex("(?=look)ahead"),
        regex(&"(".repeat(500)),
        regex(&"x".repeat(20_000)),
        grammar("start: missing".to_owned()),
        grammar("start: (".to_owned()),
        grammar(String::new()),
        grammar(format!("start: {}\"x\"{}", "(".repeat(100), ")".repeat(100))),
    ];
    let mut said = String::new();
    for constraint in wrong {
        let what = format!("{constraint:?}").chars().take(120).collect::<String>();
        let request = request(&tokenizer, constraint, 1);
        let begin = Instant::now();
        let Err(error) = engine.generate(&[request], &mut silent) else { panic!("{what} was served") };
        assert!(begin.elapsed() < Duration::from_secs(10), "{error}: {:?}", begin.elapsed());
        assert!(matches!(error, EngineError::Constraint(_)), "{error}");
        writeln!(said, "{error}").unwrap();
    }
    insta::assert_snapshot!(said);
    // what may be refused or served, but in bounded time either way
    let odd = [
        schema(json!({"$ref": "#"})),
        schema(json!({"allOf": [{"$ref": "#"}, {"type": "object"}]})),
        schema(
            json!({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        ),
        schema(json!({"type": "string", "minLength": 100_000, "maxLength": 1_000_000})),
        schema(json!({"type": "array", "minItems": 1_000_000, "items": {"type": "boolean"}})),
        schema(json!({"type": "string", "pattern": "(x+x+)+y"})),
        schema(json!({"type": "number", "multipleOf": 1e-300})),
        schema(json!({"type": "object", "additionalProperties": {"$ref": "#"}})),
        regex("(a|a|a|a|a|a)*b(a|b){90}"),
        regex("(((a{1,900}){1,900}){1,900}){1,900}"),
        regex("([a-z]+[0-9]*)+[^a-f]{200}"),
        regex(r"\p{L}{1,300}\p{N}{1,300}"),
        regex(""),
        grammar("start: start start | \"a\"".to_owned()),
        grammar(format!("start: a0\n{doubling}a60: \"x\"")),
        grammar("start: a\na: b\nb: a".to_owned()),
    ];
    for constraint in odd {
        let what = format!("{constraint:?}").chars().take(120).collect::<String>();
        let request = Request { max_tokens: 30, ..request(&tokenizer, constraint, 1) };
        let begin = Instant::now();
        let outcome = engine.generate(&[request], &mut silent);
        let took = begin.elapsed();
        if let Err(error) = &outcome {
            assert!(matches!(error, EngineError::Constraint(_)), "{what}: {error}");
        }
        println!("{took:.2?} {what}: {:?}", outcome.map(|mut all| all.remove(0).text));
        assert!(took < Duration::from_secs(20), "{what}: {took:?}");
    }
    let peak = minke_infer::machine::peak_rss_bytes().unwrap_or(0);
    println!("peak {peak}");
    assert!(peak < 3 << 30, "{peak} bytes at the peak");
    let mut engine = Engine::new(&mut model, &cpu, None);
    let error = engine.generate(&[request(&tokenizer, Constraint::JsonObject, 1)], &mut silent).unwrap_err();
    assert_eq!(error, EngineError::Constraint(ConstraintError::NeedsTokenizer));
}
