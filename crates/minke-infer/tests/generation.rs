//! Generation and scoring on real folders: the parity vectors, and a folder with a tokenizer made here.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_data::tokenizer::TrainOptions;
use minke_infer::{
    Delta, Engine, EngineError, Generation, Loaded, Request, Sampling, Session, StopReason, load_model,
};
use minke_model::{CacheKind, DType, Fp8, Precision, Purpose};

fn vectors(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors").join(name)
}

fn loaded(name: &str, dtype: DType) -> Loaded {
    opened(name, Precision::uniform(dtype))
}

/// As a model that only runs: in FP8 there are codes and no numbers.
fn opened(name: &str, precision: Precision) -> Loaded {
    load_model(vectors(name).to_str().unwrap(), Some(precision), Purpose::Run(&Cpu::detect(2))).unwrap()
}

fn precisions() -> [Precision; 3] {
    [Precision::uniform(DType::F32), Precision::uniform(DType::Bf16), Precision::fp8(Fp8::default())]
}

/// All bytes and a few merges.
fn tokenizer() -> Tokenizer {
    let sample = vec!["the whale dives and the whale sings: ünder the wäve 鯨\n".repeat(20)];
    Tokenizer::train(&sample, &TrainOptions { vocab_size: 300, ..TrainOptions::default() }).unwrap()
}

fn silent(_: Delta<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn request(seed: u64, length: usize, w: u32) -> Request {
    Request {
        prompt: (0..length as u64).map(|i| minke_num::rng::below(seed, 9, i, u64::from(w)) as u32).collect(),
        max_tokens: 12,
        sampling: Sampling {
            temperature: 0.9,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.01,
            seed,
            ..Sampling::default()
        },
        sequence: seed + 1,
        ..Request::default()
    }
}

fn bits(generation: &Generation) -> Vec<u32> {
    generation.log_probs.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_request_gives_the_same_bits_alone_in_a_batch_and_at_any_number_of_threads() {
    let latent = ["v3_groups_published", "v2_greedy_yarn_published", "v3_mtp1"];
    let grouped = ["llama_gqa", "llama_biases_llama3", "mistral_window", "qwen2_window_tied"];
    let others = ["qwen3_biases_window", "qwen3_moe_steps", "gemma2_caps", "gemma3_published"];
    let all = latent.into_iter().chain(grouped).chain(others).map(|name| (name, CacheKind::Model));
    for (name, kind) in all.chain(latent.map(|name| (name, CacheKind::Auto))) {
        for precision in precisions() {
            let mut model = opened(name, precision).model;
            let dtype = (precision.linear, precision.coded.any());
            let w = model.config.vocab_size as u32;
            // more tokens than one call takes
            let lengths = [1, 40, 7, 200, 63, 190, 30];
            let mut requests: Vec<Request> =
                lengths.iter().zip(0..).map(|(&length, seed)| request(seed, length, w)).collect();
            // the same prompt, read once, and another answer to it
            requests.push(Request { sequence: 99, ..requests[3].clone() });
            let cpu = Cpu::detect(1);
            let alone: Vec<Generation> = requests
                .iter()
                .map(|request| {
                    let engine = Engine::new(&mut model, &cpu, None).traced();
                    let mut engine = engine.with_cache(kind).unwrap();
                    engine.generate(std::slice::from_ref(request), &mut silent).unwrap().pop().unwrap()
                })
                .collect();
            assert_ne!(alone[3].tokens, alone[7].tokens);
            assert!(alone.iter().all(|one| one.tokens.len() == 12 && one.stop == StopReason::MaxTokens));
            assert_ne!(alone[0].tokens, alone[1].tokens);
            for threads in [1, 2, 3] {
                let cpu = Cpu::detect(threads);
                let engine = Engine::new(&mut model, &cpu, None).traced();
                let mut engine = engine.with_cache(kind).unwrap();
                // and a second copy of each
                let doubled: Vec<Request> = requests.iter().chain(&requests).cloned().collect();
                let batch = engine.generate(&doubled, &mut silent).unwrap();
                for (i, got) in batch.iter().enumerate() {
                    let one = &alone[i % alone.len()];
                    assert_eq!(got.tokens, one.tokens, "{name}, {dtype:?}, request {i}, {threads} threads");
                    assert_eq!(bits(got), bits(one), "{name}, {dtype:?}, request {i}, {threads} threads");
                    assert_eq!(got.trace, one.trace, "{name}, {dtype:?}, request {i}, {threads} threads");
                }
            }
        }
    }
}

#[test]
fn generation_says_the_log_probs_that_scoring_gives() {
    let mut model = loaded("v3_groups_published", DType::Bf16).model;
    let cpu = Cpu::detect(0);
    let mut engine = Engine::new(&mut model, &cpu, None);
    let request = request(3, 30, 96);
    let generation = engine.generate(std::slice::from_ref(&request), &mut silent).unwrap().pop().unwrap();
    let whole = [&request.prompt[..], &generation.tokens].concat();
    let mut rows = 0;
    let scores = engine.score(&whole, &mut |logits| rows += logits.len() / 96).unwrap();
    assert_eq!((scores.len(), rows), (whole.len() - 1, whole.len()));
    let tail: Vec<u32> = scores[request.prompt.len() - 1..].iter().map(|x| x.to_bits()).collect();
    assert_eq!(tail, bits(&generation));
}

#[test]
fn a_plain_draw_says_the_log_probs_that_scoring_gives_whatever_is_drawn_beside_it() {
    for name in ["v3_groups_published", "llama_gqa"] {
        for precision in precisions() {
            let mut model = opened(name, precision).model;
            let dtype = (precision.linear, precision.coded.any());
            let plain =
                |seed| Request { sampling: Sampling { seed, ..Sampling::default() }, ..request(seed, 9, 96) };
            let filtered = Request {
                sampling: Sampling { top_k: 5, seed: 4, ..Sampling::default() },
                ..request(4, 9, 96)
            };
            let greedy = Request { sampling: Sampling::greedy(), ..request(5, 9, 96) };
            let mixed = [plain(1), filtered, plain(2), request(3, 9, 96), greedy];
            let cpu = Cpu::detect(2);
            for requests in [&mixed[..], &mixed[..1]] {
                let generations =
                    Engine::new(&mut model, &cpu, None).traced().generate(requests, &mut silent).unwrap();
                for (request, generation) in requests.iter().zip(&generations) {
                    let whole = [&request.prompt[..], &generation.tokens].concat();
                    let scores = Engine::new(&mut model, &cpu, None).score(&whole, &mut |_| {}).unwrap();
                    let tail: Vec<u32> =
                        scores[request.prompt.len() - 1..].iter().map(|x| x.to_bits()).collect();
                    assert_eq!(tail, bits(generation), "{name}, {dtype:?}, {:?}", request.sampling);
                    let drawn: Vec<u32> = generation.trace.log_probs.iter().map(|x| x.to_bits()).collect();
                    let is_plain =
                        request.sampling == Sampling { seed: request.sampling.seed, ..Sampling::default() };
                    assert_eq!(drawn == tail, is_plain, "{name}, {dtype:?}, {:?}", request.sampling);
                }
                // nothing else changes where nobody asks for them
                let mut engine = Engine::new(&mut model, &cpu, None).traced().without_log_probs();
                let mut counts = Vec::new();
                let without = engine
                    .generate(requests, &mut |delta| {
                        counts.push(delta.tokens);
                        ControlFlow::Continue(())
                    })
                    .unwrap();
                let expected: Vec<usize> = (1..=12).flat_map(|tokens| vec![tokens; requests.len()]).collect();
                assert_eq!(counts, expected);
                for (with, without) in generations.iter().zip(without) {
                    assert!(without.log_probs.is_empty());
                    assert_eq!(*with, Generation { log_probs: with.log_probs.clone(), ..without });
                }
            }
        }
    }
}

#[test]
fn a_session_reads_only_what_is_new_and_changes_nothing() {
    let mut model = loaded("v3_yarn_parameters", DType::F32).model;
    let cpu = Cpu::detect(0);
    let mut engine = Engine::new(&mut model, &cpu, None);
    let mut session = [Session::new(engine.model())];
    let first = request(5, 20, 96);
    let one =
        engine.generate_in(&mut session, std::slice::from_ref(&first), &mut silent).unwrap().pop().unwrap();
    assert_eq!((one.reused, session[0].len()), (0, 20 + 12 - 1));
    let mut second = request(5, 0, 96);
    second.prompt = [&first.prompt[..], &one.tokens, &[7, 8, 9]].concat();
    let two =
        engine.generate_in(&mut session, std::slice::from_ref(&second), &mut silent).unwrap().pop().unwrap();
    assert_eq!(two.reused, 20 + 12 - 1);
    // another text with the same beginning: the cache is cut back
    let mut third = second.clone();
    third.prompt.truncate(10);
    let three =
        engine.generate_in(&mut session, std::slice::from_ref(&third), &mut silent).unwrap().pop().unwrap();
    assert_eq!(three.reused, 9);
    for (request, kept) in [(&second, &two), (&third, &three)] {
        let fresh = engine.generate(std::slice::from_ref(request), &mut silent).unwrap().pop().unwrap();
        assert_eq!(fresh.tokens, kept.tokens);
        assert_eq!(bits(&fresh), bits(kept));
    }
}

#[test]
fn requests_end_for_their_reasons() {
    let mut model = loaded("llama_gqa", DType::F32).model;
    let limit = model.config.max_position_embeddings;
    let cpu = Cpu::detect(0);
    let mut engine = Engine::new(&mut model, &cpu, None);
    let mut run = |request: &Request| engine.generate(std::slice::from_ref(request), &mut silent);
    let free = request(1, 8, 96);
    let whole = run(&free).unwrap().pop().unwrap();

    let stop_ids = vec![whole.tokens[5]];
    let at = whole.tokens.iter().position(|id| stop_ids.contains(id)).unwrap();
    let stopped = run(&Request { stop_ids: stop_ids.clone(), ..free.clone() }).unwrap().pop().unwrap();
    assert_eq!((&stopped.tokens[..], stopped.stop), (&whole.tokens[..at], StopReason::Token(stop_ids[0])));

    let full = request(1, limit - 3, 96);
    let full = run(&full).unwrap().pop().unwrap();
    assert_eq!((full.tokens.len(), full.stop), (3, StopReason::Context));

    let none = run(&Request { max_tokens: 0, ..free.clone() }).unwrap().pop().unwrap();
    assert_eq!((none.tokens.len(), none.stop), (0, StopReason::MaxTokens));

    assert_eq!(run(&request(1, 0, 96)).unwrap_err(), EngineError::EmptyPrompt);
    let too_long = run(&request(1, limit, 96)).unwrap_err();
    assert_eq!(too_long, EngineError::Context { got: limit + 1, limit });
    let outside = run(&Request { prompt: vec![3, 96], ..free.clone() }).unwrap_err();
    assert_eq!(outside, EngineError::Token { index: 1, id: 96, vocabulary: 96 });
    let stop = run(&Request { stop: vec!["x".into()], ..free.clone() }).unwrap_err();
    assert_eq!(stop, EngineError::StopNeedsTokenizer);

    let mut seen = 0;
    let cancelled = engine
        .generate(&[free.clone(), free], &mut |_| {
            seen += 1;
            if seen == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert!(cancelled.iter().all(|one| one.stop == StopReason::Cancelled && one.tokens.len() == 2));
}

/// A model whose weights are drawn, with as many rows as the tokenizer needs.
fn with_text(tokenizer: &Tokenizer) -> minke_model::Model {
    let text = std::fs::read_to_string(vectors("v3_plain").join("config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["initializer_range"] = 0.3.into();
    let config = minke_model::Config::from_json(&value).unwrap();
    minke_model::Model::random(config, Precision::uniform(DType::F32), 11)
}

#[test]
fn streamed_text_is_the_text_and_stop_strings_cross_tokens() {
    let tokenizer = tokenizer();
    let mut model = with_text(&tokenizer);
    let cpu = Cpu::detect(0);
    let mut engine = Engine::new(&mut model, &cpu, Some(&tokenizer));
    let mut free = request(2, 0, 96);
    free.prompt = tokenizer.encode("the whale").unwrap();
    free.max_tokens = 200;
    free.sampling.top_p = 1.0;
    free.sampling.top_k = 0;
    let mut streamed = String::new();
    let collect = |text: &mut String, engine: &mut Engine<'_>, request: &Request| {
        text.clear();
        engine
            .generate(std::slice::from_ref(request), &mut |delta| {
                text.push_str(delta.text);
                ControlFlow::Continue(())
            })
            .unwrap()
            .pop()
            .unwrap()
    };
    let whole = collect(&mut streamed, &mut engine, &free);
    assert_eq!(whole.text, tokenizer.decode(&whole.tokens, true));
    assert_eq!(streamed, whole.text);
    // a random model writes broken UTF-8, so this is a test of its repair too
    assert!(whole.text.contains('\u{fffd}'), "{:?}", whole.text);

    // a stop string from the middle of the text, over several tokens
    let characters: Vec<char> = whole.text.chars().collect();
    let stop: String = characters[60..66].iter().collect();
    let before = &whole.text[..whole.text.find(&stop).unwrap()];
    let stopped = collect(
        &mut streamed,
        &mut engine,
        &Request { stop: vec![stop.clone(), "\u{1}never".into()], ..free },
    );
    assert_eq!(stopped.stop, StopReason::String(stop));
    assert_eq!((stopped.text.as_str(), streamed.as_str()), (before, before));
    assert!(stopped.tokens.len() < whole.tokens.len());
    assert_eq!(stopped.tokens, whole.tokens[..stopped.tokens.len()]);
}

#[test]
fn broken_weights_are_an_error_and_not_a_loop() {
    let mut model = loaded("llama_gqa", DType::F32).model;
    model.params.data.fill(f32::NAN);
    model.weights_changed();
    let cpu = Cpu::detect(1);
    let mut engine = Engine::new(&mut model, &cpu, None);
    let error = engine.generate(&[request(1, 4, 96)], &mut silent).unwrap_err();
    assert_eq!(error, EngineError::NotANumber { position: 4 });
}
