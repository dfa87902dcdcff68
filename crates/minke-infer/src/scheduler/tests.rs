//! Requests under load against requests alone, bit for bit.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use minke_cpu::Cpu;
use minke_data::gguf::TensorType;
use minke_data::{Tokenizer, TrainOptions};
use minke_model::{CacheKind, Config, DType, KvFormat, Model, Precision, Purpose};
use minke_num::blocks::BlockFormat;
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, TestRunner};

use super::*;
use crate::constrain::Constraint;
use crate::engine::Generation;
use crate::gguf::tests::{Temporary, random_source};
use crate::load_model;
use crate::sampling::Sampling;
use crate::sequence::Session;
use crate::speculate::Speculation;

const CONTEXT: usize = 512;
const VOCABULARY: u64 = 96;

/// The shape of a committed vector, with a longer context.
fn shape(name: &str) -> serde_json::Value {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors");
    let text = std::fs::read_to_string(vectors.join(name).join("config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["initializer_range"] = 0.3.into();
    value["max_position_embeddings"] = CONTEXT.into();
    value
}

/// A model of such a shape and weights that are drawn.
fn model(name: &str, dtype: DType) -> Model {
    Model::random(Config::from_json(&shape(name)).unwrap(), Precision::uniform(dtype), 5)
}

fn text(seed: u64, len: usize) -> Vec<u32> {
    (0..len as u64).map(|i| minke_num::rng::below(seed, 9, i, VOCABULARY) as u32).collect()
}

fn request(prompt: Vec<u32>, max_tokens: usize, seed: u64) -> Request {
    let sampling =
        Sampling { temperature: 0.9, top_k: 40, top_p: 0.95, min_p: 0.01, seed, ..Sampling::default() };
    Request { prompt, max_tokens, sampling, sequence: seed, ..Request::default() }
}

/// Requests that share beginnings: of whole pages, of parts of one, of nothing, and all.
fn requests() -> Vec<Request> {
    let long = text(1, 200);
    let with = |len: usize, tail: u64, more: usize| [&long[..len], &text(tail, more)].concat();
    let mut all = vec![
        request(with(200, 2, 0), 70, 1),
        request(with(200, 2, 0), 9, 2),
        request(with(130, 3, 50), 70, 3),
        request(with(128, 4, 1), 5, 4),
        request(with(64, 5, 100), 40, 5),
        request(with(40, 6, 7), 90, 6),
        request(text(7, 3), 130, 7),
        request(text(8, 65), 1, 8),
        request(text(9, 1), 30, 9),
    ];
    // a stop token, which most likely comes
    all[5].stop_ids = (0..8).collect();
    // what is remembered of the answer outlives giving way
    all[2].sampling.frequency_penalty = 0.5;
    all[6].sampling.repetition_penalty = 1.3;
    all[6].top_log_probs = 3;
    all[6].logit_bias = vec![(3, 2.0), (9, -100.0)];
    // drafts take pages and give them back
    all[0].speculation = Speculation::Ngram;
    all[2].speculation = Speculation::Auto;
    all[5].speculation = Speculation::Ngram;
    all[6].speculation = Speculation::Auto;
    all[6].sampling.temperature = 0.2;
    all
}

fn alone(model: &mut Model, cpu: &Cpu, all: &[Request], cache: CacheKind) -> Vec<Generation> {
    let run = |request: &Request| {
        let mut engine = Engine::new(model, cpu, None).with_cache(cache).unwrap();
        let mut go = |_: crate::Delta<'_>| ControlFlow::Continue(());
        let plain = Request { speculation: Speculation::Off, ..request.clone() };
        engine.generate(std::slice::from_ref(&plain), &mut go).unwrap().pop().unwrap()
    };
    all.iter().map(run).collect()
}

fn job(priority: i32) -> (Job, Receiver<Event>) {
    let (sender, events) = mpsc::channel();
    let sink = move |event| {
        let _ = sender.send(event);
        ControlFlow::Continue(())
    };
    (Job::new(priority, None, Box::new(sink), std::sync::Arc::default()), events)
}

/// Tokens and bits of their log-probabilities, and how it ended.
fn told(events: &Receiver<Event>) -> (Vec<(u32, u32)>, Option<Done>) {
    let mut tokens = Vec::new();
    for event in events.try_iter() {
        match event {
            Event::Accepted => {}
            Event::Token(token) => tokens.push((token.id, token.log_prob.unwrap().to_bits())),
            Event::Done(done) => return (tokens, Some(done)),
            Event::Failed(error) => panic!("{error}"),
        }
    }
    (tokens, None)
}

fn expected(generation: &Generation) -> Vec<(u32, u32)> {
    generation.tokens.iter().copied().zip(generation.log_probs.iter().map(|p| p.to_bits())).collect()
}

/// What always holds between two calls.
fn check(scheduler: &Scheduler<'_>) {
    let held: usize = scheduler.jobs.iter().map(|job| job.pages).sum();
    assert!(scheduler.tree.in_use() <= held);
    assert!(scheduler.pages() <= scheduler.stats.most_pages, "{:?}", scheduler.stats);
    // what models have read to draft is in it
    let drafts = |sequence: &Sequence| {
        let modules: usize = sequence.drafting.modules.iter().map(|module| module.cache.bytes()).sum();
        modules + sequence.drafting.other.as_ref().map_or(0, Session::bytes)
    };
    let all = scheduler.sequences.iter().chain(scheduler.waiting.iter().map(|(_, sequence)| sequence));
    let bytes = scheduler.tree.len() * scheduler.page_bytes + all.map(drafts).sum::<usize>();
    assert!(bytes <= scheduler.stats.most_pages * scheduler.page_bytes, "{bytes}: {:?}", scheduler.stats);
    assert!(scheduler.sequences.len() <= scheduler.options.max_running);
    for (job, sequence) in scheduler.jobs.iter().zip(&scheduler.sequences) {
        assert_eq!(job.pages, sequence.session.len() / PAGE);
        assert_eq!(sequence.session.tokens, sequence.all[..sequence.session.len()]);
    }
    let ranks: Vec<_> = scheduler.waiting.iter().map(|(job, _)| job.rank()).collect();
    assert!(ranks.is_sorted());
}

/// What a person does to a service, one after the other.
#[derive(Debug, Clone)]
enum Deed {
    Submit(usize, i32),
    Steps(usize),
    Cancel(usize),
    /// As a deadline does.
    Expire(usize),
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let deed = prop_oneof![
        5 => (0..requests().len(), -1..2_i32).prop_map(|(request, priority)| Deed::Submit(request, priority)),
        4 => (1..12_usize).prop_map(Deed::Steps),
        1 => (0..32_usize).prop_map(Deed::Cancel),
        1 => (0..32_usize).prop_map(Deed::Expire),
    ];
    proptest::collection::vec(deed, 1..24)
}

fn options() -> impl Strategy<Value = (ServiceOptions, usize)> {
    // a request takes up to six pages
    (1..6_usize, 8..120_usize, 0..40_usize, 6..20_usize).prop_map(|(max_running, tokens, beside, pages)| {
        let options = ServiceOptions {
            max_running,
            tokens_per_call: tokens,
            prompt_tokens_beside: beside,
            ..ServiceOptions::default()
        };
        (options, pages)
    })
}

/// Serves all requests in any company, and compares with what they gave `alone`.
fn under_load(model: &mut Model, alone: &[Generation], cpu: &Cpu, cache: CacheKind, cases: u32) -> Stats {
    let all = requests();
    let mut runner = TestRunner::new_with_rng(
        Runs { cases, failure_persistence: None, ..Runs::default() },
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let sum = std::cell::RefCell::new((Stats::default(), model));
    let run = |((options, pages), deeds): ((ServiceOptions, usize), Vec<Deed>)| {
        let (sum, model) = &mut *sum.borrow_mut();
        let engine = Engine::new(model, cpu, None).with_cache(cache).unwrap();
        let mut scheduler = Scheduler::new(engine, options, pages);
        let mut asked = Vec::new();
        for deed in deeds {
            match deed {
                Deed::Submit(request, priority) => {
                    let (job, events) = job(priority);
                    asked.push((request, job.cancelled.clone(), events));
                    scheduler.submit(all[request].clone(), None, job);
                }
                Deed::Steps(steps) => (0..steps).for_each(|_| {
                    scheduler.step();
                    check(&scheduler);
                }),
                Deed::Cancel(at) if at < asked.len() => asked[at].1.store(true, Ordering::Release),
                Deed::Expire(at) => {
                    let jobs = scheduler.waiting.iter_mut().map(|(job, _)| job).chain(&mut scheduler.jobs);
                    if let Some(job) = jobs.into_iter().find(|job| job.arrival == at as u64) {
                        job.deadline = Some(Instant::now());
                    }
                }
                Deed::Cancel(_) => {}
            }
        }
        let mut left = 10_000;
        while scheduler.step() {
            check(&scheduler);
            left -= 1;
            assert!(left > 0, "it never ends: {:?}", scheduler.stats);
        }
        assert_eq!(scheduler.tree.in_use(), 0);
        assert_eq!(scheduler.pages(), scheduler.tree.len());
        assert_eq!(scheduler.stats.ended, asked.len() as u64);
        for (request, _, events) in &asked {
            let (tokens, done) = told(events);
            let (expected, done) = (expected(&alone[*request]), done.expect("every request ends"));
            if matches!(done.stop, StopReason::Cancelled | StopReason::Deadline) {
                prop_assert_eq!(&tokens[..], &expected[..tokens.len()]);
            } else {
                prop_assert_eq!(&done.stop, &alone[*request].stop);
                prop_assert_eq!(&tokens, &expected);
            }
            prop_assert_eq!(done.usage.completion, tokens.len());
            prop_assert!(done.usage.cached < all[*request].prompt.len());
        }
        sum.preempted += scheduler.stats.preempted;
        sum.cached += scheduler.stats.cached;
        sum.ended += scheduler.stats.ended;
        Ok(())
    };
    runner.run(&(options(), deeds()), run).unwrap();
    sum.into_inner().0
}

#[test]
fn a_request_gives_the_same_bits_alone_and_under_any_load() {
    let (latent, int8) = (CacheKind::Latent(Some(KvFormat::Int8)), CacheKind::Expanded(KvFormat::Int8));
    let (cpu, all) = (Cpu::detect(2), requests());
    for (name, dtype, cache) in [
        ("v3_groups_published", DType::F32, CacheKind::Model),
        ("v3_groups_published", DType::Bf16, CacheKind::Auto),
        ("v3_mtp1", DType::F32, CacheKind::Auto),
        ("v3_mtp1", DType::Bf16, CacheKind::Model),
        ("v3_mtp1", DType::Bf16, CacheKind::Auto),
        ("v3_mtp1", DType::Bf16, latent),
        ("v3_mtp1", DType::Bf16, int8),
        ("v3_mtp2", DType::F32, CacheKind::Model),
        ("llama_gqa", DType::F32, int8),
        ("llama_gqa", DType::Bf16, CacheKind::Model),
    ] {
        let mut model = model(name, dtype);
        let alone = alone(&mut model, &cpu, &all, cache);
        let stats = under_load(&mut model, &alone, &cpu, cache, 48);
        // the cases are only worth something when all of this happens
        assert!(
            stats.preempted > 10 && stats.cached > 1000 && stats.ended > 100,
            "{name} {cache:?}: {stats:?}"
        );
    }
}

/// As [`a_request_gives_the_same_bits_alone_and_under_any_load`] with weights in blocks in a file, which are laid anew while
/// answers are written.
#[test]
fn weights_in_blocks_give_the_same_bits_too() {
    let (cpu, all) = (Cpu::detect(2), requests());
    for (name, format) in [("v3_mtp1", BlockFormat::Q8_0), ("llama_gqa", BlockFormat::Q4_0)] {
        // whole blocks
        let mut shape = shape(name);
        for (field, size) in [("hidden_size", 64), ("intermediate_size", 64), ("moe_intermediate_size", 32)] {
            shape[field] = size.into();
        }
        for field in ["kv_lora_rank", "q_lora_rank"] {
            if shape[field].is_u64() {
                shape[field] = 32.into();
            }
        }
        let config = Config::from_json(&shape).unwrap();
        let file = Temporary::new();
        file.try_write(&config, &random_source(&config, 5), TensorType::Blocks(format)).unwrap();
        let load = || load_model(file.path().to_str().unwrap(), None, Purpose::Run(&cpu)).unwrap().model;
        let mut model = load();
        assert!(model.mapped_bytes() > 10_000, "{name}: {}", model.mapped_bytes());
        model.leave_mapped_weights();
        let alone = alone(&mut model, &cpu, &all, CacheKind::Auto);
        let stats = under_load(&mut load(), &alone, &cpu, CacheKind::Auto, 24);
        assert!(stats.preempted > 5 && stats.cached > 500 && stats.ended > 50, "{name}: {stats:?}");
    }
}

/// Where there is no memory for drafts of a model there are none, and the answers are the same.
#[test]
fn drafts_give_way_before_answers_do() {
    // two modules take what the model's two layers do
    for (name, speculation) in [("llama_gqa", Speculation::Draft), ("v3_mtp2", Speculation::Mtp)] {
        drafts_of_models_give_way(name, speculation);
    }
}

/// Drafts of a model like itself, or of its modules.
fn drafts_of_models_give_way(name: &str, speculation: Speculation) {
    let [mut alone_, mut main, mut draft] = [(); 3].map(|()| model(name, DType::F32));
    let cpu = Cpu::detect(1);
    let all: Vec<Request> = (0..2)
        .map(|seed| {
            let mut request = request(text(seed, 100), 60, seed);
            (request.sampling.temperature, request.speculation) = (0.0, speculation);
            request
        })
        .collect();
    let alone = alone(&mut alone_, &cpu, &all, CacheKind::Model);
    let mut by_pages = Vec::new();
    for pages in [64, 9, 3] {
        let engine = Engine::new(&mut main, &cpu, None).with_draft(&mut draft, None).unwrap();
        let mut scheduler = Scheduler::new(engine, ServiceOptions::default(), pages);
        let mut heard = Vec::new();
        for request in &all {
            let (job, events) = job(0);
            scheduler.submit(request.clone(), None, job);
            heard.push(events);
        }
        while scheduler.step() {
            check(&scheduler);
        }
        assert_eq!(scheduler.stats.preempted, 0);
        let mut drafted = 0;
        for (events, alone) in heard.iter().zip(&alone) {
            let (tokens, done) = told(events);
            assert_eq!(tokens, expected(alone));
            drafted += done.unwrap().speculated.drafted;
        }
        by_pages.push(drafted);
    }
    // all the time, until there is no room, never
    assert!(by_pages[0] > by_pages[1] && by_pages[1] > 0 && by_pages[2] == 0, "{by_pages:?}");
}

/// One request after the other, and two at once: how many tokens of a prompt are read.
#[test]
fn beginnings_are_read_once() {
    let (mut model, cpu) = (model("llama_gqa", DType::Bf16), Cpu::detect(1));
    let engine = Engine::new(&mut model, &cpu, None);
    let mut scheduler = Scheduler::new(engine, ServiceOptions::default(), 64);
    let long = text(1, 200);
    let serve = |scheduler: &mut Scheduler<'_>, all: &[Request]| -> Vec<Usage> {
        let mut events = Vec::new();
        for request in all {
            let (job, heard) = job(0);
            scheduler.submit(request.clone(), None, job);
            events.push(heard);
        }
        while scheduler.step() {}
        events.iter().map(|events| told(events).1.unwrap().usage).collect()
    };
    let usage = |prompt, cached, completion| Usage { prompt, cached, completion };
    let first = request(long.clone(), 80, 1);
    assert_eq!(serve(&mut scheduler, std::slice::from_ref(&first)), [usage(200, 0, 80)]);
    // the next turn: prompt and answer are there in whole pages, 200 + 80 - 1 tokens
    let answer = scheduler_answer(&mut scheduler, &first);
    let second = request([&long[..], &answer, &text(2, 30)].concat(), 1, 2);
    assert_eq!(serve(&mut scheduler, &[second]), [usage(310, 256, 1)]);
    // the same text at once, four times: read once, but for each one's last token
    let fresh = request(text(3, 100), 3, 3);
    let four = [fresh.clone(), fresh.clone(), fresh.clone(), fresh];
    let expected = [usage(100, 0, 3), usage(100, 99, 3), usage(100, 99, 3), usage(100, 99, 3)];
    assert_eq!(serve(&mut scheduler, &four), expected);
    // a whole number of pages: the last token is read again for its logits
    let exact = request(long[..128].to_vec(), 1, 4);
    assert_eq!(serve(&mut scheduler, &[exact]), [usage(128, 64, 1)]);
}

fn scheduler_answer(scheduler: &mut Scheduler<'_>, request: &Request) -> Vec<u32> {
    let (job, events) = job(0);
    scheduler.submit(request.clone(), None, job);
    while scheduler.step() {}
    told(&events).0.iter().map(|(id, _)| *id).collect()
}

/// Each call has a token of who is being answered, however much there is to read, and the urgent go first.
#[test]
fn the_answered_never_wait_and_the_urgent_go_first() {
    let (mut model, cpu) = (model("llama_gqa", DType::F32), Cpu::detect(1));
    let engine = Engine::new(&mut model, &cpu, None);
    let options = ServiceOptions {
        max_running: 3,
        tokens_per_call: 64,
        prompt_tokens_beside: 16,
        ..ServiceOptions::default()
    };
    let mut scheduler = Scheduler::new(engine, options, 64);
    let (talk, heard) = job(0);
    scheduler.submit(request(text(1, 10), 40, 1), None, talk);
    scheduler.step();
    let rest: Vec<_> = (2..5).map(|seed| (request(text(seed, 400), 2, seed), job(0))).collect();
    let mut ends = Vec::new();
    for (request, (job, events)) in rest {
        scheduler.submit(request, None, job);
        ends.push(events);
    }
    assert_eq!(told(&heard).0.len(), 1);
    for _ in 0..20 {
        scheduler.step();
        assert_eq!(told(&heard).0.len(), 1);
    }
    // more urgent than those that are being read: one of them gives way
    assert_eq!((scheduler.sequences.len(), scheduler.stats.preempted), (3, 0));
    let (urgent, heard) = job(1);
    scheduler.submit(request(text(9, 20), 1, 9), None, urgent);
    scheduler.step();
    scheduler.step();
    assert_eq!((told(&heard).0.len(), scheduler.stats.preempted), (1, 1));
    while scheduler.step() {}
    for events in ends {
        assert_eq!(told(&events).0.len(), 2);
    }
}

#[test]
fn what_cannot_be_served_is_told_and_harms_nobody() {
    let (mut model, cpu) = (model("llama_gqa", DType::F32), Cpu::detect(1));
    let mut scheduler = Scheduler::new(Engine::new(&mut model, &cpu, None), ServiceOptions::default(), 4);
    let ask = |scheduler: &mut Scheduler<'_>, request: Request| {
        let (job, events) = job(0);
        scheduler.submit(request, None, job);
        while scheduler.step() {}
        events.try_iter().last().unwrap()
    };
    let failed = |error: crate::EngineError| Event::Failed(error);
    assert_eq!(ask(&mut scheduler, request(vec![], 3, 1)), failed(crate::EngineError::EmptyPrompt));
    let memory = crate::EngineError::Memory { got: 257, limit: 256 };
    assert_eq!(ask(&mut scheduler, request(text(1, 256), 3, 1)), failed(memory));
    let Event::Done(done) = ask(&mut scheduler, request(text(1, 250), 100, 1)) else { panic!("it fits") };
    assert_eq!((done.stop, done.usage.completion), (StopReason::Context, 6));
    let Event::Done(done) = ask(&mut scheduler, request(text(1, 8), 0, 1)) else { panic!("nothing to do") };
    assert_eq!((done.stop, done.usage.completion), (StopReason::MaxTokens, 0));
    // weights that give no numbers
    drop(scheduler);
    model.params.data.fill(f32::NAN);
    model.weights_changed();
    let mut scheduler = Scheduler::new(Engine::new(&mut model, &cpu, None), ServiceOptions::default(), 4);
    let broken = crate::EngineError::NotANumber { position: 8 };
    assert_eq!(ask(&mut scheduler, request(text(1, 8), 3, 1)), failed(broken));
}

#[test]
fn pages_go_by_least_recent_use_and_from_the_end() {
    let (mut model, cpu) = (model("llama_gqa", DType::F32), Cpu::detect(1));
    let mut scheduler = Scheduler::new(Engine::new(&mut model, &cpu, None), ServiceOptions::default(), 8);
    let read = |scheduler: &mut Scheduler<'_>, seed: u64, len: usize| {
        let (job, events) = job(0);
        scheduler.submit(request(text(seed, len), 1, seed), None, job);
        while scheduler.step() {}
        told(&events).1.unwrap().usage.cached
    };
    // three pages each: two texts fit beside the one that is being read
    assert_eq!(read(&mut scheduler, 1, 195), 0);
    assert_eq!(read(&mut scheduler, 2, 195), 0);
    assert_eq!(read(&mut scheduler, 1, 195), 192);
    assert_eq!(read(&mut scheduler, 3, 195), 0);
    // of the second, which was used least recently, the beginning is left
    assert_eq!(read(&mut scheduler, 1, 195), 192);
    assert_eq!(read(&mut scheduler, 2, 195), 64);
}

fn service(options: ServiceOptions) -> Service {
    Service::start(model("v3_groups_published", DType::Bf16), Cpu::detect(2), None, None, options).unwrap()
}

fn order(request: Request) -> Order {
    Order { request, ..Order::default() }
}

#[test]
fn a_service_answers_many_threads() {
    let (mut reference, cpu) = (model("v3_groups_published", DType::Bf16), Cpu::detect(2));
    let all = requests();
    let alone = alone(&mut reference, &cpu, &all, CacheKind::Model);
    let service = service(ServiceOptions { max_running: 4, ..ServiceOptions::default() });
    std::thread::scope(|scope| {
        for (request, alone) in all.iter().zip(&alone) {
            let handle = service.handle();
            scope.spawn(move || {
                let events: Vec<Event> = handle.stream(order(request.clone())).unwrap().collect();
                assert_eq!(events[0], Event::Accepted);
                let Some(Event::Done(done)) = events.last() else { panic!("{events:?}") };
                assert_eq!(done.stop, alone.stop);
                let tokens = events.iter().filter_map(|event| match event {
                    Event::Token(token) => Some((token.id, token.log_prob.unwrap().to_bits())),
                    _ => None,
                });
                assert_eq!(tokens.collect::<Vec<_>>(), expected(alone));
            });
        }
    });
}

/// What a constraint takes to be compiled is no time of those who are answered: the thread of the model does not hear of it.
#[test]
fn constraints_are_compiled_beside_the_model() {
    let sample = vec!["the whale dives and the whale sings\n".repeat(20)];
    let tokenizer =
        Tokenizer::train(&sample, &TrainOptions { vocab_size: 280, ..TrainOptions::default() }).unwrap();
    let mut config = model("llama_gqa", DType::F32).config;
    config.vocab_size = tokenizer.vocab_size();
    let model = Model::random(config, Precision::uniform(DType::F32), 5);
    let service =
        Service::start(model, Cpu::detect(1), Some(tokenizer), None, ServiceOptions::default()).unwrap();
    let handle = service.handle();
    // who listens to this one does not let the model go on
    let (taken, is_taken) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let stay = move |_| {
        let _ = taken.send(());
        let _ = may_go.recv();
        ControlFlow::Break(())
    };
    let _ticket = handle.submit(order(request(text(1, 4), 9, 1)), Box::new(stay)).unwrap();
    is_taken.recv().unwrap();
    let with = |regex: &str| Request {
        constraint: Some(Constraint::Regex(regex.to_owned())),
        ..request(text(1, 4), 9, 1)
    };
    let wrong = handle.stream(order(with("("))).unwrap().next();
    assert!(matches!(wrong, Some(Event::Failed(crate::EngineError::Constraint(_)))), "{wrong:?}");
    let form = handle.compile(&Constraint::Regex("ab{3}".to_owned())).unwrap();
    let orders = [Some(form.clone()), Some(form), None].map(|form| Order { form, ..order(with("ab{3}")) });
    let streams = orders.map(|order| handle.stream(order).unwrap());
    drop(go);
    for stream in streams {
        let said: String = stream
            .filter_map(|event| match event {
                Event::Token(token) => Some(token.text),
                Event::Done(done) => Some(done.text),
                _ => None,
            })
            .collect();
        assert_eq!(said, "abbb");
    }
}

#[test]
fn a_draft_model_makes_the_same_answers_with_fewer_calls() {
    let name = "v3_groups_published";
    let (mut reference, cpu) = (model(name, DType::Bf16), Cpu::detect(2));
    let all = requests();
    let alone = alone(&mut reference, &cpu, &all, CacheKind::Model);
    // the same model drafts what it will say itself, where it says the likeliest
    let draft = Some((model(name, DType::Bf16), None));
    let service =
        Service::start(model(name, DType::Bf16), Cpu::detect(2), None, draft, ServiceOptions::default())
            .unwrap();
    let mut accepted = 0;
    for (request, alone) in all.iter().zip(&alone) {
        let drafted = Request { speculation: Speculation::Draft, ..request.clone() };
        let events: Vec<Event> = service.handle().stream(order(drafted)).unwrap().collect();
        let Some(Event::Done(done)) = events.last() else { panic!("{events:?}") };
        accepted += done.speculated.accepted;
        let tokens = events.iter().filter_map(|event| match event {
            Event::Token(token) => Some((token.id, token.log_prob.unwrap().to_bits())),
            _ => None,
        });
        assert_eq!(tokens.collect::<Vec<_>>(), expected(alone));
    }
    assert!(accepted > 0, "no draft came");
}

#[test]
fn dropping_a_stream_cancels_and_the_queue_has_an_end() {
    let service = service(ServiceOptions { max_running: 1, max_waiting: 2, ..ServiceOptions::default() });
    let handle = service.handle();
    let long = || order(request(text(1, 4), 500, 1));
    let mut first = handle.stream(long()).unwrap();
    assert_eq!(first.next(), Some(Event::Accepted));
    assert!(matches!(first.next(), Some(Event::Token(_))));
    let (mut second, third) = (handle.stream(long()).unwrap(), handle.stream(long()).unwrap());
    assert_eq!(handle.stream(long()).unwrap_err(), SubmitError::Full(2));
    drop(third);
    drop(first);
    // the second takes the place of the first
    assert!(second.any(|event| matches!(event, Event::Token(_))));
    let late = Order { deadline: Some(Instant::now()), ..long() };
    let Some(Event::Done(done)) = handle.stream(late).unwrap().last() else { panic!("it ends") };
    assert_eq!((done.stop, done.begun, done.usage.completion), (StopReason::Deadline, false, 0));
    let begin = Instant::now();
    drop(service);
    assert!(begin.elapsed() < Duration::from_secs(5));
    // what was still running was told
    let Some(Event::Done(done)) = second.last() else { panic!("it ends") };
    assert_eq!((done.stop, done.begun), (StopReason::Cancelled, true));
    assert_eq!(handle.stream(long()).unwrap_err(), SubmitError::Stopped);
}

#[test]
fn other_caches_are_served_too_and_bad_options_are_refused() {
    let prompt = || request(text(1, 90), 6, 1);
    let run = |name, cache| {
        let options = ServiceOptions { cache, ..ServiceOptions::default() };
        let service = Service::start(model(name, DType::Bf16), Cpu::detect(1), None, None, options)?;
        let one: Vec<Event> = service.handle().stream(order(prompt())).unwrap().collect();
        let two: Vec<Event> = service.handle().stream(order(prompt())).unwrap().collect();
        let tokens = |events: &[Event]| -> Vec<Event> {
            events.iter().filter(|event| matches!(event, Event::Token(_))).cloned().collect()
        };
        assert_eq!((tokens(&one).len(), tokens(&one)), (6, tokens(&two)));
        Ok::<_, ServiceError>(tokens(&one))
    };
    let model_s = run("v3_groups_published", CacheKind::Model).unwrap();
    assert_eq!(run("v3_groups_published", CacheKind::Expanded(KvFormat::Bf16)).unwrap(), model_s);
    assert_ne!(run("v3_groups_published", CacheKind::Expanded(KvFormat::F32)).unwrap(), model_s);
    for format in [KvFormat::F32, KvFormat::Bf16, KvFormat::Int8] {
        assert_ne!(run("v3_groups_published", CacheKind::Latent(Some(format))).unwrap(), model_s);
    }
    assert_ne!(run("v3_groups_published", CacheKind::Expanded(KvFormat::Int8)).unwrap(), model_s);
    let latents = run("v3_groups_published", CacheKind::Latent(None)).unwrap();
    assert_eq!(run("v3_groups_published", CacheKind::Auto).unwrap(), latents);
    assert_eq!(run("llama_gqa", CacheKind::Auto).unwrap(), run("llama_gqa", CacheKind::Model).unwrap());
    let refused = run("llama_gqa", CacheKind::Latent(Some(KvFormat::F32))).unwrap_err().to_string();
    assert_eq!(refused, "a cache of latents needs a model with latent attention, and this one has none");
    let options = ServiceOptions { cache_bytes: 100, ..ServiceOptions::default() };
    let refused =
        Service::start(model("llama_gqa", DType::F32), Cpu::detect(1), None, None, options).err().unwrap();
    assert!(
        refused.to_string().starts_with("100 bytes of memory for caches are too few: 2 pages of 64 tokens")
    );
}
