//! Drafts of prediction modules against the same modules over whole texts.

use std::path::Path;

use minke_cpu::Cpu;
use minke_model::{Cache, Config, DType, DraftStep, Precision, Step, Want};

use super::control::{Rate, Trust};
use super::*;
use crate::engine::{Engine, Request};
use crate::sampling::Sampling;
use crate::sequence::Sequence;

/// Few tokens, so that some drafts come and some do not.
const TOKENS: [u32; 3] = [3, 9, 17];

fn model(modules: usize) -> Model {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors");
    let text = std::fs::read_to_string(vectors.join("v3_mtp2/config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["initializer_range"] = 0.3.into();
    value["num_nextn_predict_layers"] = modules.into();
    Model::random(Config::from_json(&value).unwrap(), Precision::uniform(DType::F32), 7)
}

fn likeliest(row: &[f32]) -> u32 {
    TOKENS.into_iter().max_by(|a, b| row[*a as usize].total_cmp(&row[*b as usize])).unwrap()
}

/// The drafts behind a text of which the model has read all but the last token, from nothing that was kept.
fn drafts(model: &mut Model, cpu: &Cpu, all: &[u32], count: usize) -> Vec<u32> {
    let (d, read, mut cache) = (model.config.hidden_size, all.len() - 1, Cache::new(model));
    let mut steps = [Step { tokens: &all[..read], cache: &mut cache, want: Want::None }];
    let mut states = model.infer_whole(cpu, &mut steps, true).states;
    let (mut caches, mut text) = (DraftCache::of_modules(model), all.to_vec());
    for step in 0..count {
        let k = step.min(caches.len() - 1);
        if step > k {
            states.drain(..states.len() - d);
        }
        let position = text.len() - states.len() / d;
        let (tokens, cache) = (&text[position..], &mut caches[k]);
        let made = model.draft(cpu, k, &mut [DraftStep { states: &states, tokens, position, cache }]);
        states = made.states;
        text.push(likeliest(made.logits.f32()));
    }
    text.split_off(all.len())
}

/// Whatever was drafted, kept and refused before, each module reads what it was trained on: all states of the one
/// before, with the tokens that came, and drafts only behind them.
#[test]
fn modules_draft_as_over_whole_texts() {
    let cpu = Cpu::detect(2);
    for modules in 1..=4 {
        let mut model = model(modules);
        let mut engine = Engine::new(&mut model, &cpu, None);
        let mut sequences: Vec<Sequence> = [5, 1, 40]
            .map(|len| {
                let request = Request {
                    prompt: (0..len).map(|i| i * i % 90).collect(),
                    max_tokens: 80,
                    sampling: Sampling::greedy(),
                    logit_bias: TOKENS.map(|id| (id, 100.0)).to_vec(),
                    speculation: Speculation::Mtp,
                    ..Request::default()
                };
                let guide = engine.guide_with(&request, None).unwrap();
                Sequence::new(request, guide, engine.empty_session(), None)
            })
            .into();
        let mut longest = 0;
        for call in 0..16 {
            for sequence in &mut sequences {
                // as far as may be, and at times less
                let rate = Rate::new(if call % 5 == 1 { 0.3 } else { 0.99 });
                let trust = &mut sequence.drafting.trust;
                (sequence.drafting.rates[2], *trust) = (rate, Trust::default());
                (0..10).for_each(|sure| *trust.rate(sure as f32 / 10.0) = rate);
            }
            let takes: Vec<usize> = sequences.iter().map(Sequence::unread).collect();
            if call % 3 == 0 && call > 0 {
                let mut parts = engine.parts(&mut sequences, &takes);
                for part in &mut parts {
                    let sequence = &mut sequences[part.at];
                    sequence.guide.rewind(part.mark.take().expect("it drafts"));
                    let made: Vec<u32> = part.made.iter().map(|(id, _)| *id).collect();
                    assert!(!made.is_empty());
                    assert_eq!(
                        made,
                        drafts(engine.model, &cpu, &sequence.all, made.len()),
                        "{modules} modules, call {call}"
                    );
                    longest = longest.max(made.len());
                }
            }
            engine.step(&mut sequences, &takes);
        }
        assert_eq!(longest, MOST_BY_MODEL);
        let sum = |of: fn(&Speculated) -> usize| -> usize {
            sequences.iter().map(|one| of(&one.drafting.stats)).sum()
        };
        let (drafted, accepted) = (sum(|stats| stats.drafted), sum(|stats| stats.accepted));
        assert!(accepted > 10 && drafted > accepted + 50, "{accepted} of {drafted}");
    }
}
