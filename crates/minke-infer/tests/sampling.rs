//! What a request says about its tokens, on a real folder and on a model whose weights are drawn.

use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::Path;

use minke_cpu::Cpu;
use minke_data::{Tokenizer, TrainOptions};
use minke_infer::{
    Delta, Engine, EngineError, Generation, Request, Sampling, Speculation, StopReason, ThinkingBudget,
    Thought,
};
use minke_model::{Config, DType, Model, Precision};

fn tokenizer() -> Tokenizer {
    let sample = vec!["the whale dives and the whale sings: ünder the wäve 鯨\n".repeat(20)];
    Tokenizer::train(&sample, &TrainOptions { vocab_size: 300, ..TrainOptions::default() }).unwrap()
}

/// A model whose weights are drawn, with as many rows as the tokenizer needs.
fn model(tokenizer: &Tokenizer) -> Model {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors/v3_plain");
    let text = std::fs::read_to_string(vectors.join("config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["initializer_range"] = 0.3.into();
    Model::random(Config::from_json(&value).unwrap(), Precision::uniform(DType::F32), 11)
}

fn silent(_: Delta<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn request(tokenizer: &Tokenizer, prompt: &str, sequence: u64) -> Request {
    Request {
        prompt: tokenizer.encode_with_special(prompt).unwrap(),
        max_tokens: 40,
        sampling: Sampling { temperature: 0.9, top_p: 0.97, seed: 3, ..Sampling::default() },
        sequence,
        ..Request::default()
    }
}

fn one(engine: &mut Engine<'_>, request: &Request) -> Generation {
    engine.generate(std::slice::from_ref(request), &mut silent).unwrap().pop().unwrap()
}

/// Requests of every kind that this file knows.
fn kinds(tokenizer: &Tokenizer) -> Vec<Request> {
    let plain = request(tokenizer, "the whale", 1);
    let warm = plain.sampling;
    let stop_ids: Vec<u32> = (20..120).collect();
    vec![
        plain.clone(),
        Request { sampling: Sampling { repetition_penalty: 1.3, ..warm }, ..plain.clone() },
        Request {
            sampling: Sampling { presence_penalty: 1.5, frequency_penalty: 0.5, ..warm },
            ..plain.clone()
        },
        Request {
            sampling: Sampling { repetition_penalty: 1.2, frequency_penalty: 1.0, ..Sampling::greedy() },
            ..plain.clone()
        },
        Request { logit_bias: vec![(40, 6.0), (41, -100.0)], top_log_probs: 3, ..plain.clone() },
        Request { sampling: Sampling { typical_p: 0.5, ..warm }, ..plain.clone() },
        Request { stop_ids, min_tokens: 7, ..plain.clone() },
        Request { thinking: Some(ThinkingBudget::new(5)), ..request(tokenizer, "why?<think>\n", 2) },
        request(tokenizer, "the whale", 9),
    ]
}

#[test]
fn every_kind_of_request_gives_the_same_alone_and_in_any_batch() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let requests = kinds(&tokenizer);
    let cpu = Cpu::detect(1);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let alone: Vec<Generation> = requests.iter().map(|request| one(&mut engine, request)).collect();
    for (i, a) in alone.iter().enumerate() {
        // a setting that did nothing would be no test
        assert!(alone[..i].iter().all(|b| a.tokens != b.tokens), "request {i}");
    }
    let cpu = Cpu::detect(2);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    assert_eq!(engine.generate(&requests, &mut silent).unwrap(), alone);
}

#[test]
fn bias_forbids_and_forces_and_the_likeliest_are_told() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(0);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    for sampling in [Sampling::greedy(), Sampling { seed: 5, ..Sampling::default() }] {
        let plain = Request { sampling, top_log_probs: 4, ..request(&tokenizer, "the whale", 1) };
        let free = one(&mut engine, &plain);
        let bans: Vec<(u32, f32)> = free.tokens.iter().map(|&id| (id, -100.0)).collect();
        let banned = one(&mut engine, &Request { logit_bias: bans, ..plain.clone() });
        assert!(banned.tokens.iter().all(|id| !free.tokens.contains(id)));
        let forced = one(&mut engine, &Request { logit_bias: vec![(77, 100.0)], ..plain.clone() });
        assert_eq!(forced.tokens, [77; 40]);
        // told are the model's own, whatever was done to them
        for generation in [&free, &banned, &forced] {
            let whole = [&plain.prompt[..], &generation.tokens].concat();
            let scores = engine.score(&whole, &mut |_| {}).unwrap();
            let tail = scores[plain.prompt.len() - 1..].iter().map(|x| x.to_bits());
            assert!(tail.eq(generation.log_probs.iter().map(|x| x.to_bits())));
            assert_eq!(generation.top_log_probs.len(), 40);
            for ((top, id), log_prob) in
                generation.top_log_probs.iter().zip(&generation.tokens).zip(&generation.log_probs)
            {
                assert!(top.len() == 4 && top.is_sorted_by(|a, b| a.1 >= b.1));
                let told = top.iter().find(|(other, _)| other == id);
                assert!(told.is_none_or(|(_, x)| x.to_bits() == log_prob.to_bits()));
                assert!(told.is_some() || *log_prob <= top[3].1);
            }
        }
        if sampling.temperature == 0.0 {
            assert!(free.top_log_probs.iter().zip(&free.tokens).all(|(top, id)| top[0].0 == *id));
        }
    }
}

#[test]
fn an_answer_does_not_stop_before_it_may() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(0);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let everything: Vec<u32> = (16..tokenizer.vocab_size() as u32).collect();
    let plain = request(&tokenizer, "the whale", 4);
    for min_tokens in [0, 1, 9] {
        let stopping = Request { stop_ids: everything.clone(), min_tokens, ..plain.clone() };
        let generation = one(&mut engine, &stopping);
        assert!(generation.tokens.len() >= min_tokens, "{}", generation.tokens.len());
        assert!(matches!(generation.stop, StopReason::Token(_)), "{:?}", generation.stop);
    }
    // a stop string that comes up early is text
    let free = one(&mut engine, &plain);
    let text = |tokens: &[u32]| tokenizer.decode(tokens, true);
    let stop: String = text(&free.tokens[..3]).chars().take(1).collect();
    let late = Request { stop: vec![stop.clone()], min_tokens: 3, ..plain.clone() };
    let generation = one(&mut engine, &late);
    assert!(generation.tokens.len() > 3 && generation.text.starts_with(&stop), "{generation:?}");
}

#[test]
fn a_thought_ends_where_its_budget_does_and_the_answer_goes_on() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(0);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let closing = tokenizer.encode_with_special("\n</think>\n\n").unwrap();
    let close = tokenizer.id_of("</think>").unwrap();
    // the model shall not end it by itself
    let free = Request { logit_bias: vec![(close, -90.0)], ..request(&tokenizer, "why?<think>\n", 2) };
    let unbounded = one(&mut engine, &free);
    assert_eq!(unbounded.thought, None);
    let bounded = Request { thinking: Some(ThinkingBudget::new(6)), ..free.clone() };
    let generation = one(&mut engine, &bounded);
    assert_eq!(generation.tokens[..6], unbounded.tokens[..6]);
    assert_eq!(generation.tokens[6..6 + closing.len()], closing);
    assert_eq!(generation.tokens.len(), 40);
    assert_eq!(generation.thought, Some(Thought { tokens: 6, forced: closing.len(), closed: true }));
    assert!(generation.text.contains("\n</think>\n\n"), "{:?}", generation.text);
    // there is room: nothing is forced, and nothing changes
    let roomy = one(&mut engine, &Request { thinking: Some(ThinkingBudget::new(100)), ..free });
    assert_eq!(roomy.tokens, unbounded.tokens);
    assert_eq!(roomy.thought, Some(Thought { tokens: 40, forced: 0, closed: false }));
    // who would think on may not, alone and beside others
    let open = tokenizer.id_of("<think>").unwrap();
    let eager = Request { logit_bias: vec![(close, -90.0), (open, 90.0)], ..bounded.clone() };
    let cut = one(&mut engine, &eager);
    assert_eq!(cut.tokens[..6], [open; 6]);
    let behind = &cut.tokens[6 + closing.len()..];
    assert!(behind.len() > 20 && behind.iter().all(|id| ![open, close].contains(id)), "{cut:?}");
    for speculation in [Speculation::Off, Speculation::Ngram] {
        let eager = Request { speculation, ..eager.clone() };
        let many = engine.generate(&[bounded.clone(), eager.clone(), eager], &mut silent).unwrap();
        assert_eq!(many[0].tokens, generation.tokens);
        assert!(many[1..].iter().all(|one| one.tokens == cut.tokens && one.log_probs == cut.log_probs));
    }
    let error = Engine::new(&mut model, &cpu, None).generate(&[bounded], &mut silent).unwrap_err();
    assert_eq!(error, EngineError::ThinkingNeedsTokenizer);
}

#[test]
fn settings_out_of_bounds_and_what_cannot_be_traced_are_errors() {
    let tokenizer = tokenizer();
    let mut model = model(&tokenizer);
    let cpu = Cpu::detect(0);
    let good = request(&tokenizer, "the whale", 1);
    let w = tokenizer.vocab_size() as u32;
    let bad = [
        Request { logit_bias: vec![(w, 1.0)], ..good.clone() },
        Request { logit_bias: vec![(0, 101.0)], ..good.clone() },
        Request { logit_bias: vec![(0, f32::NAN)], ..good.clone() },
        Request { min_tokens: 41, ..good.clone() },
        Request { top_log_probs: 129, ..good.clone() },
        Request { sampling: Sampling { repetition_penalty: -1.0, ..good.sampling }, ..good.clone() },
    ];
    let mut said = String::new();
    for request in bad {
        let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
        let error = engine.generate(&[good.clone(), request], &mut silent).unwrap_err();
        assert!(matches!(error, EngineError::Setting(_)));
        writeln!(said, "{error}").unwrap();
    }
    insta::assert_snapshot!(said);
    // what only takes tokens away is traced: a trainer tempers the same ids
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer)).traced();
    let bans: Vec<(u32, f32)> = (0..50).map(|id| (id, -100.0)).collect();
    let traced = one(&mut engine, &Request { logit_bias: bans, ..good.clone() });
    assert!(traced.trace.kept.iter().all(|kept| !kept.is_empty() && kept.iter().all(|&id| id >= 50)));
    for refused in [
        Request { logit_bias: vec![(0, 1.0)], ..good.clone() },
        Request { sampling: Sampling { frequency_penalty: 0.1, ..good.sampling }, ..good },
    ] {
        let error = engine.generate(&[refused], &mut silent).unwrap_err();
        assert_eq!(error, EngineError::TracedPenalties);
    }
}
