//! Speculation changes nothing but the number of calls: every mode against none, bit for bit.

use std::ops::ControlFlow;
use std::path::Path;

use minke_cpu::Cpu;
use minke_data::{Tokenizer, TrainOptions};
use minke_infer::{
    Constraint, Delta, Engine, EngineError, Generation, Request, Sampling, Session, Speculated, Speculation,
    ThinkingBudget,
};
use minke_model::{CacheKind, Config, DType, Model, Precision};
use proptest::prelude::*;
use serde_json::json;

fn tokenizer() -> Tokenizer {
    let sample =
        vec!["the whale dives and the whale sings: ünder the wäve 鯨 {\"a\": [true, 12]}\n".repeat(20)];
    Tokenizer::train(&sample, &TrainOptions { vocab_size: 300, ..TrainOptions::default() }).unwrap()
}

/// A model whose weights are drawn, with as many rows as the tokenizer needs; `v3_mtp1` and `v3_mtp2` have
/// prediction modules.
fn model(name: &str, tokenizer: &Tokenizer, dtype: DType, seed: u64) -> Model {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors").join(name);
    let text = std::fs::read_to_string(vectors.join("config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["initializer_range"] = 0.3.into();
    value["max_position_embeddings"] = 256.into();
    Model::random(Config::from_json(&value).unwrap(), Precision::uniform(dtype), seed)
}

fn silent(_: Delta<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Requests of every kind.
fn kinds(tokenizer: &Tokenizer) -> Vec<Request> {
    let warm = Sampling { temperature: 0.7, top_p: 0.95, seed: 3, ..Sampling::default() };
    let plain = Request {
        prompt: tokenizer.encode("the whale sings, the whale dives, the whale").unwrap(),
        max_tokens: 60,
        sampling: warm,
        ..Request::default()
    };
    let greedy = Request { sampling: Sampling::greedy(), ..plain.clone() };
    let eos: Vec<u32> = tokenizer.eos().into_iter().collect();
    let schema = json!({
        "type": "object",
        "properties": {"whale": {"enum": ["blue", "small"]}, "depths": {"type": "array", "maxItems": 3,
            "items": {"type": "integer", "minimum": 0, "maximum": 99}}},
        "required": ["whale", "depths"],
        "additionalProperties": false
    });
    vec![
        greedy.clone(),
        plain.clone(),
        Request { sampling: Sampling::default(), sequence: 7, ..plain.clone() },
        Request { sampling: Sampling { top_k: 4, min_p: 0.05, temperature: 0.4, ..warm }, ..plain.clone() },
        Request {
            sampling: Sampling {
                repetition_penalty: 1.1,
                presence_penalty: 0.2,
                frequency_penalty: 0.1,
                ..Sampling::greedy()
            },
            logit_bias: vec![(90, 2.0), (91, -100.0)],
            top_log_probs: 2,
            ..plain.clone()
        },
        Request { stop_ids: (20..60).collect(), min_tokens: 9, ..plain.clone() },
        Request { stop: vec!["e".into(), "a ".into()], min_tokens: 11, ..greedy.clone() },
        Request {
            constraint: Some(Constraint::JsonSchema(schema.clone())),
            stop_ids: eos.clone(),
            max_tokens: 120,
            ..plain.clone()
        },
        Request { constraint: Some(Constraint::Regex("(abc){3,9}[0-9]{5}".into())), ..greedy.clone() },
        Request {
            prompt: tokenizer.encode_with_special("how deep?<think>\n").unwrap(),
            thinking: Some(ThinkingBudget::new(7)),
            constraint: Some(Constraint::JsonSchema(schema.clone())),
            constrain_answer_only: true,
            stop_ids: eos.clone(),
            max_tokens: 120,
            ..plain.clone()
        },
        // begins its thought itself
        Request {
            thinking: Some(ThinkingBudget::new(7)),
            constraint: Some(Constraint::JsonSchema(schema)),
            constrain_answer_only: true,
            logit_bias: vec![(tokenizer.id_of("<think>").unwrap(), 5.0)],
            stop_ids: eos,
            max_tokens: 120,
            ..plain.clone()
        },
        // ends at the context
        Request { prompt: vec![70; 240], max_tokens: 60, ..greedy },
    ]
}

/// All that a caller gets, but not how many calls it took.
fn result(generation: &Generation) -> Generation {
    Generation { speculated: Speculated::default(), ..generation.clone() }
}

fn bits(generation: &Generation) -> Vec<u32> {
    generation.log_probs.iter().map(|x| x.to_bits()).collect()
}

const MODES: [Speculation; 4] = [Speculation::Auto, Speculation::Ngram, Speculation::Mtp, Speculation::Draft];

/// Compares every mode with none, alone and together, and gives what came of all drafts by mode.
fn compare(
    model: &mut Model,
    draft: &mut Model,
    tokenizer: &Tokenizer,
    requests: &[Request],
    modes: &[Speculation],
    cache: CacheKind,
) -> Vec<Speculated> {
    let cpu = Cpu::detect(2);
    let run = |model: &mut Model, draft: &mut Model, requests: &[Request]| -> (Vec<Generation>, Vec<usize>) {
        let engine = Engine::new(model, &cpu, Some(tokenizer)).with_cache(cache).unwrap();
        let mut engine = engine.with_draft(draft, Some(tokenizer)).unwrap();
        let mut sessions: Vec<Session> = requests.iter().map(|_| engine.empty_session()).collect();
        let generations = engine.generate_in(&mut sessions, requests, &mut silent).unwrap();
        (generations, sessions.iter().map(Session::len).collect())
    };
    let (plain, held) = run(model, draft, requests);
    for generation in &plain {
        assert_eq!((generation.speculated.drafted, generation.speculated.accepted), (0, 0));
        assert!(generation.speculated.calls >= generation.tokens.len());
    }
    let mut all = Vec::new();
    for &speculation in modes {
        let requests: Vec<Request> =
            requests.iter().map(|one| Request { speculation, ..one.clone() }).collect();
        let (together, held_together) = run(model, draft, &requests);
        let mut sum = Speculated::default();
        for (at, request) in requests.iter().enumerate() {
            let (alone, held_alone) = run(model, draft, std::slice::from_ref(request));
            for (got, len) in [(&alone[0], held_alone[0]), (&together[at], held_together[at])] {
                assert_eq!(result(got), result(&plain[at]), "{speculation:?}, request {at}");
                assert_eq!(bits(got), bits(&plain[at]), "{speculation:?}, request {at}");
                assert_eq!(len, held[at], "{speculation:?}, request {at}");
            }
            let Speculated { drafted, accepted, calls } = alone[0].speculated;
            // an end is no token, and may come in a call of its own or behind a draft that came
            let tokens = plain[at].tokens.len();
            assert!((tokens..=tokens + 1).contains(&(calls + accepted)), "{speculation:?}, request {at}");
            sum.drafted += drafted;
            sum.accepted += accepted;
            sum.calls += calls;
        }
        println!("{speculation:?}: {sum:?}, {:.2} tokens a call", sum.tokens_per_call());
        all.push(sum);
    }
    all
}

#[test]
fn every_mode_gives_what_none_gives() {
    let tokenizer = tokenizer();
    for (name, dtype) in
        [("v3_mtp1", DType::F32), ("v3_mtp1", DType::Bf16), ("v3_mtp2", DType::F32), ("v3_mtp2", DType::Bf16)]
    {
        let mut target = model(name, &tokenizer, dtype, 11);
        // one that always agrees, and one that hardly ever does
        for seed in [11, 12] {
            let mut draft = model(name, &tokenizer, dtype, seed);
            let kinds = kinds(&tokenizer);
            let sums = compare(&mut target, &mut draft, &tokenizer, &kinds, &MODES, CacheKind::Model);
            // a greedy model of drawn weights runs in circles
            assert!(sums[1].accepted > 20, "{:?}", sums[1]);
            assert!(sums[2].drafted > 50, "{:?}", sums[2]);
            if seed == 11 {
                // what agrees on all logits agrees on all draws, up to a stop string
                assert!(sums[3].drafted - sums[3].accepted < 8, "{:?}", sums[3]);
                assert!(sums[3].tokens_per_call() > 3.0, "{:?}", sums[3]);
            }
            // drafts of a module, over keys and values, are verified over latents
            let sums = compare(&mut target, &mut draft, &tokenizer, &kinds, &MODES, CacheKind::Auto);
            assert!(sums[1].accepted > 20 && sums[2].drafted > 50, "{sums:?}");
        }
    }
}

#[test]
fn a_model_without_a_module_drafts_from_its_text() {
    let tokenizer = tokenizer();
    let mut target = model("llama_gqa", &tokenizer, DType::Bf16, 5);
    let mut draft = model("v3_plain", &tokenizer, DType::F32, 6);
    let modes = [Speculation::Auto, Speculation::Ngram, Speculation::Draft];
    compare(&mut target, &mut draft, &tokenizer, &kinds(&tokenizer), &modes, CacheKind::Model);
    let cpu = Cpu::detect(1);
    let request = |speculation| Request { prompt: vec![1], max_tokens: 3, speculation, ..Request::default() };
    let mut engine = Engine::new(&mut target, &cpu, Some(&tokenizer));
    for speculation in [Speculation::Mtp, Speculation::Draft] {
        let error = engine.generate(&[request(speculation)], &mut silent).unwrap_err();
        assert!(matches!(error, EngineError::CannotDraft { .. }), "{error}");
    }
    // another vocabulary
    let sample = vec!["something else entirely, and more of it than that\n".repeat(20)];
    let other =
        Tokenizer::train(&sample, &TrainOptions { vocab_size: 300, ..TrainOptions::default() }).unwrap();
    let Err(error) = engine.with_draft(&mut draft, Some(&other)) else { panic!("taken") };
    assert!(matches!(error, EngineError::DraftVocabulary { .. }), "{error}");
}

/// What was read in turns before, or further back than they look, prediction modules have no rows of.
#[test]
fn modules_draft_without_what_they_have_not_read() {
    let tokenizer = tokenizer();
    let cpu = Cpu::detect(2);
    for name in ["v3_mtp1", "v3_mtp2"] {
        let mut target = model(name, &tokenizer, DType::Bf16, 11);
        let mut engine = Engine::new(&mut target, &cpu, Some(&tokenizer));
        let mut turns = |speculation: Speculation| {
            let mut sessions: Vec<Session> = (0..4).map(|_| engine.empty_session()).collect();
            let mut requests: Vec<Request> = [2_u32, 40, 70, 150]
                .map(|len| Request {
                    prompt: (0..len).map(|i| 30 + (i * i + len) % 200).collect(),
                    max_tokens: 20,
                    sampling: Sampling { temperature: 0.7, seed: 3, ..Sampling::default() },
                    ..Request::default()
                })
                .into();
            let mut all = Vec::new();
            // modules that draft in one turn are new in the next
            for speculation in [Speculation::Off, speculation, speculation] {
                for request in &mut requests {
                    request.speculation = speculation;
                }
                let made = engine.generate_in(&mut sessions, &requests, &mut silent).unwrap();
                for ((request, session), one) in requests.iter_mut().zip(&sessions).zip(&made) {
                    assert!(session.len() + 1 >= request.prompt.len() + one.tokens.len());
                    request.prompt.extend(&one.tokens);
                    request.prompt.extend([70, 80, 90]);
                }
                all.extend(made);
            }
            all
        };
        let (plain, drafted) = (turns(Speculation::Off), turns(Speculation::Mtp));
        for (plain, drafted) in plain.iter().zip(&drafted) {
            assert_eq!((result(drafted), bits(drafted)), (result(plain), bits(plain)), "{name}");
        }
        assert!(drafted[4..].iter().all(|one| one.speculated.drafted > 5), "{name}");
    }
}

/// Prompts that are together more than the other model reads in a call: it drafts for those that it has read.
#[test]
fn another_model_reads_long_prompts_in_parts() {
    let tokenizer = tokenizer();
    let mut target = model("v3_mtp1", &tokenizer, DType::Bf16, 11);
    let mut draft = model("v3_mtp1", &tokenizer, DType::Bf16, 11);
    let prompt = |from: u32| (from..from + 200).map(|i| i * i % 250).collect();
    let requests: Vec<Request> =
        (0..4).map(|i| Request { prompt: prompt(i), max_tokens: 24, ..Request::default() }).collect();
    let cpu = Cpu::detect(2);
    compare(&mut target, &mut draft, &tokenizer, &requests, &[Speculation::Draft], CacheKind::Model);
    let engine = Engine::new(&mut target, &cpu, Some(&tokenizer));
    let mut engine = engine.with_draft(&mut draft, Some(&tokenizer)).unwrap();
    let mut sessions: Vec<Session> = requests.iter().map(|_| engine.empty_session()).collect();
    let mut generate = |max_tokens, speculation| {
        let with = |one: &Request| Request { max_tokens, speculation, ..one.clone() };
        let requests: Vec<Request> = requests.iter().map(with).collect();
        engine.generate_in(&mut sessions, &requests, &mut silent).unwrap()
    };
    // the model itself has read all of them before
    generate(1, Speculation::Off);
    let calls: Vec<usize> = generate(24, Speculation::Draft).iter().map(|one| one.speculated.calls).collect();
    assert!(calls[0] < calls[3] && calls.iter().all(|calls| *calls < 16), "{calls:?}");
}

#[test]
fn a_traced_answer_is_not_drafted() {
    let tokenizer = tokenizer();
    let mut target = model("v3_mtp1", &tokenizer, DType::F32, 5);
    let cpu = Cpu::detect(1);
    let requests: Vec<Request> = kinds(&tokenizer)
        .into_iter()
        .filter(|one| !one.sampling.has_penalties() && one.logit_bias.is_empty())
        .map(|one| Request { speculation: Speculation::Ngram, ..one })
        .collect();
    let generations =
        Engine::new(&mut target, &cpu, Some(&tokenizer)).traced().generate(&requests, &mut silent).unwrap();
    assert!(generations.iter().all(|one| one.speculated.drafted == 0 && !one.trace.tokens.is_empty()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_requests_in_any_batch(
        picks in proptest::collection::vec((0_usize..12, 0_u64..1000, 1_usize..50), 1..5),
        mode in 0_usize..4,
        modules in 1_usize..3,
        seed in 0_u64..4,
    ) {
        let tokenizer = tokenizer();
        let mut target = model(&format!("v3_mtp{modules}"), &tokenizer, DType::Bf16, seed);
        let mut draft = model("v3_mtp1", &tokenizer, DType::Bf16, seed / 2);
        let kinds = kinds(&tokenizer);
        let requests: Vec<Request> = picks
            .iter()
            .map(|&(kind, sequence, more)| {
                let one = &kinds[kind];
                Request { sequence, max_tokens: one.min_tokens + more, ..one.clone() }
            })
            .collect();
        let cache = if seed % 2 == 0 { CacheKind::Model } else { CacheKind::Auto };
        compare(&mut target, &mut draft, &tokenizer, &requests, &MODES[mode..=mode], cache);
    }
}
