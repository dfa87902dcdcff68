//! A conversation with a model whose weights are drawn, in a real folder.

use std::ops::ControlFlow;
use std::path::Path;

use minke_cpu::Cpu;
use minke_data::hf::{Dtype, TensorSpec, write_safetensors};
use minke_data::{Message, Role, Thinking, Tokenizer, TrainOptions};
use minke_infer::{
    Assistant, AssistantError, Engine, EngineError, Piece, Request, Speculation, StopReason, load_model,
};
use minke_model::{Config, DType, Model, Precision, Purpose};

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\
                        {{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}\
                        {% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
                        {% if add_generation_prompt %}<|assistant|><think>{% endif %}";

/// A folder with drawn weights and a trained tokenizer; `template` makes it a chat model.
fn folder(template: Option<&str>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let sample = vec!["the whale dives and the whale sings\n".repeat(20)];
    let options = TrainOptions { vocab_size: 300, ..TrainOptions::default() };
    let tokenizer = Tokenizer::train(&sample, &options).unwrap();
    tokenizer.save(folder.path()).unwrap();
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors/v3_plain");
    let text = std::fs::read_to_string(vectors.join("config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["initializer_range"] = 0.2.into();
    std::fs::write(folder.path().join("config.json"), value.to_string()).unwrap();
    let model = Model::random(Config::from_json(&value).unwrap(), Precision::uniform(DType::F32), 3);
    let tensors: Vec<(TensorSpec, Vec<u8>)> = model
        .params
        .entries
        .iter()
        .map(|entry| {
            let spec = TensorSpec { name: entry.name.clone(), dtype: Dtype::F32, shape: entry.shape.clone() };
            (spec, model.params.data[entry.range.clone()].iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let borrowed: Vec<(TensorSpec, &[u8])> =
        tensors.iter().map(|(spec, bytes)| (spec.clone(), bytes.as_slice())).collect();
    write_safetensors(folder.path().join("model.safetensors"), &borrowed).unwrap();
    if let Some(template) = template {
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    }
    folder
}

fn load(folder: &tempfile::TempDir) -> Assistant {
    let mut assistant = Assistant::builder().threads(1).load(folder.path().to_str().unwrap()).unwrap();
    assistant.settings.max_tokens = Some(12);
    assistant
}

#[test]
fn what_is_streamed_is_the_answer_and_what_was_read_is_not_read_again() {
    let folder = folder(Some(TEMPLATE));
    let mut whale = load(&folder);
    assert!(!whale.is_base() && whale.messages().is_empty());
    let mut shown = String::new();
    let first = whale.say("the whale", |piece| shown.push_str(&piece.to_string())).unwrap();
    assert!(shown.starts_with("<think>"), "{shown}");
    let thought = first.thought.clone().unwrap();
    assert!(shown.contains(&thought) && shown.ends_with(&first.text), "{shown:?}, {first:?}");
    assert!(first.tokens > 0 && first.reused_tokens == 0 && first.prompt_tokens > 3);
    assert_eq!(whale.messages().len(), 2);
    // the second turn reads on from what the first one shared with it
    let second = whale.ask("and dives").unwrap();
    assert!(second.reused_tokens >= first.prompt_tokens, "{second:?}");
    // the same conversation in one go: the cache changes no token
    let said = whale.messages().to_vec();
    let mut other = load(&folder);
    other.set_messages(said[..3].to_vec()).unwrap();
    let again = other.retry(&mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(again.prompt_tokens, second.prompt_tokens);
    let mut greedy = [load(&folder), load(&folder)];
    for (at, assistant) in greedy.iter_mut().enumerate() {
        assistant.settings.sampling.temperature = 0.0;
        if at == 0 {
            assistant.ask("the whale sings").unwrap();
            assistant.undo().unwrap();
        }
    }
    let [a, b] = greedy.each_mut().map(|assistant| assistant.ask("the whale dives").unwrap());
    assert_eq!((a.thought, a.text, a.tokens), (b.thought, b.text, b.tokens));
    assert!(a.reused_tokens > 0 && b.reused_tokens == 0);
}

#[test]
fn drafts_change_no_answer() {
    let folder = folder(Some(TEMPLATE));
    let mut plain = load(&folder);
    let path = folder.path().to_str().unwrap();
    let draft = load_model(path, None, Purpose::Run(&Cpu::detect(1))).unwrap();
    assert!(matches!(
        plain.set_speculation(Speculation::Draft),
        Err(AssistantError::Engine(EngineError::CannotDraft { .. }))
    ));
    let mut drafted = load(&folder).with_draft(draft).unwrap();
    drafted.set_speculation(Speculation::Draft).unwrap();
    plain.set_speculation(Speculation::Off).unwrap();
    for whale in [&mut plain, &mut drafted] {
        whale.settings.max_tokens = Some(40);
        whale.settings.sampling.temperature = 0.0;
    }
    for turn in ["the whale dives and sings", "and sings and dives"] {
        let [a, b] = [&mut plain, &mut drafted].map(|whale| whale.ask(turn).unwrap());
        assert_eq!((&a.thought, &a.text, a.tokens), (&b.thought, &b.text, b.tokens));
        assert_eq!(a.speculated.drafted, 0);
        // the same model drafts what it will say
        assert!(b.speculated.accepted > 0 && b.speculated.calls < b.tokens, "{:?}", b.speculated);
    }
}

#[test]
fn turns_are_undone_and_answered_again() {
    let folder = folder(Some(TEMPLATE));
    let mut whale = load(&folder);
    assert!(matches!(whale.undo(), Err(AssistantError::NothingToUndo)));
    assert!(matches!(whale.retry(&mut |_| ControlFlow::Continue(())), Err(AssistantError::NothingToRetry)));
    whale.set_system(Some("sing")).unwrap();
    assert!(matches!(whale.retry(&mut |_| ControlFlow::Continue(())), Err(AssistantError::NothingToRetry)));
    assert!(matches!(whale.ask(" \n"), Err(AssistantError::NothingSaid)));
    let first = whale.ask("the whale").unwrap();
    let other = whale.retry(&mut |_| ControlFlow::Continue(())).unwrap();
    assert_ne!((&first.thought, &first.text), (&other.thought, &other.text));
    assert_eq!(whale.messages().len(), 3);
    assert_eq!(whale.messages()[2], Message::assistant(other.thought.as_deref(), other.text.clone()));
    whale.ask("and").unwrap();
    assert_eq!(whale.undo().unwrap(), "and");
    assert_eq!(whale.messages().len(), 3);
    whale.reset();
    assert_eq!((whale.messages().len(), whale.system()), (1, Some("sing")));
    whale.set_system(None).unwrap();
    assert!(whale.messages().is_empty());
    // as the first time
    assert_eq!(load(&folder).ask("the whale").unwrap().text, whale.ask("the whale").unwrap().text);
}

#[test]
fn an_answer_can_be_ended_and_a_thought_has_a_budget() {
    let folder = folder(Some(TEMPLATE));
    let mut whale = load(&folder);
    let mut pieces = 0;
    let stopped = whale.say_until("the whale", &mut |_| {
        pieces += 1;
        if pieces == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let stopped = stopped.unwrap();
    assert_eq!(stopped.stop, StopReason::Cancelled);
    assert!(stopped.tokens < 6 && whale.messages().len() == 2, "{stopped:?}");
    whale.settings.thinking_budget = Some(3);
    whale.settings.max_tokens = Some(30);
    let mut ends = 0;
    let bounded = whale.say("and", |piece| ends += usize::from(piece == Piece::ThoughtEnds)).unwrap();
    assert!(ends >= 1, "{bounded:?}");
}

#[test]
fn an_answer_without_thinking_has_no_thought() {
    let folder = folder(Some(TEMPLATE));
    let answers = |thinking, speculation, temperature| -> Vec<String> {
        let mut whale = load(&folder);
        whale.settings.thinking = thinking;
        whale.settings.sampling.temperature = temperature;
        whale.settings.max_tokens = Some(200);
        whale.set_speculation(speculation).unwrap();
        let mut all = vec![whale.ask("the whale").unwrap()];
        all.extend((0..7).map(|_| whale.retry(&mut |_| ControlFlow::Continue(())).unwrap()));
        let whole = |answer: &minke_infer::Answer| format!("{:?}{}", answer.thought, answer.text);
        all.iter().map(whole).collect()
    };
    let has_mark = |answer: &String| answer.contains("<think>") || answer.contains("</think>");
    for temperature in [0.0, 1.0] {
        let plain = answers(Thinking::Empty, Speculation::Off, temperature);
        assert!(plain.iter().all(|answer| answer.starts_with("None") && !has_mark(answer)), "{plain:?}");
        assert_eq!(answers(Thinking::Empty, Speculation::Ngram, temperature), plain);
    }
    // this model writes marks wherever it may
    assert!(answers(Thinking::Default, Speculation::Off, 1.0).iter().any(has_mark));
}

#[test]
fn a_full_context_is_told_and_nothing_is_forgotten() {
    let folder = folder(Some(TEMPLATE));
    let mut whale = load(&folder);
    let long = "sings ".repeat(whale.context());
    let error = whale.ask(&long).unwrap_err();
    let AssistantError::Full { tokens, context } = error else { panic!("{error}") };
    assert!(
        tokens >= context && context == whale.context() && error.to_string().contains(&tokens.to_string())
    );
    assert!(whale.messages().is_empty());
    let error = whale.set_messages(vec![Message::user(long)]).unwrap_err();
    assert!(matches!(error, AssistantError::Full { .. }) && whale.messages().is_empty());
    // turns add up to more than it holds, and the one that does not fit leaves the others as they were
    whale.settings.max_tokens = None;
    let (before, error) = loop {
        let before = whale.messages().to_vec();
        match whale.ask("the whale dives and the whale sings") {
            Ok(_) => assert!(before.len() < 200),
            Err(error) => break (before, error),
        }
    };
    assert!(matches!(error, AssistantError::Full { .. }), "{error}");
    assert!(whale.messages() == before && !before.is_empty());
    whale.undo().unwrap();
    assert_eq!(whale.messages().len(), before.len() - 2);
}

#[test]
fn a_base_model_goes_on_with_its_text() {
    let folder = folder(None);
    let mut whale = load(&folder);
    assert!(whale.is_base());
    assert!(matches!(whale.set_system(Some("x")), Err(AssistantError::NoTemplate)));
    let first = whale.ask("the whale").unwrap();
    assert_eq!(whale.text(), format!("the whale{}", first.text));
    let second = whale.ask("and dives").unwrap();
    assert!(second.reused_tokens > 0);
    let between = if first.text.ends_with('\n') { "" } else { "\n" };
    assert_eq!(whale.text(), format!("the whale{}{between}and dives{}", first.text, second.text));
    let written = whale.text();
    whale.retry(&mut |_| ControlFlow::Continue(())).unwrap();
    assert_ne!(whale.text(), written);
    whale.undo().unwrap();
    assert_eq!(whale.text(), format!("the whale{}", first.text));
    whale.set_text("the whale").unwrap();
    assert_eq!(whale.text(), "the whale");
    // it knows no thoughts, and a bound on them binds nothing
    whale.settings.thinking_budget = Some(3);
    whale.ask("").unwrap();
    whale.settings.thinking_budget = None;
    whale.reset();
    assert_eq!(whale.text(), "");
    // a text that the context cuts off says so
    whale.settings.max_tokens = None;
    let (mut turns, mut typed) = (0, "the whale");
    loop {
        let answer = whale.ask(typed).unwrap();
        (turns, typed) = (turns + 1, "");
        assert!(turns < 500);
        if answer.stop == StopReason::Context {
            break;
        }
    }
    assert_eq!(whale.used() + 1, whale.context());
    assert!(matches!(whale.ask("more"), Err(AssistantError::Full { .. })));
    whale.reset();
    whale.settings.max_tokens = Some(12);
    // the same as the engine's, token by token
    let cpu = Cpu::detect(1);
    let mut loaded = load_model(folder.path().to_str().unwrap(), None, Purpose::Run(&cpu)).unwrap();
    let tokenizer = loaded.tokenizer.clone().unwrap();
    let mut prompt: Vec<u32> = loaded.bos().into_iter().collect();
    prompt.extend(tokenizer.encode("the whale").unwrap());
    let sampling = whale.settings.sampling;
    let stop_ids = loaded.stop_ids();
    let request = Request { prompt, max_tokens: 12, sampling, stop_ids, ..Request::default() };
    let mut engine = Engine::new(&mut loaded.model, &cpu, Some(&tokenizer));
    let alone = engine.generate(&[request], &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(alone[0].text, first.text);
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    let Err(error) = Assistant::load(folder.path().to_str().unwrap()) else { panic!("it loads") };
    assert!(error.to_string().contains("no tokenizer"), "{error}");
}

#[test]
fn a_template_that_refuses_an_instruction_says_so_at_once() {
    let refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no instructions') }}{% endif %}\
                    {% for m in messages %}{{ m.content }}{% endfor %}";
    let folder = folder(Some(refusing));
    let mut whale = load(&folder);
    let error = whale.set_system(Some("x")).unwrap_err().to_string();
    assert!(error.contains("no instructions"), "{error}");
    assert!(whale.messages().iter().all(|message| message.role != Role::System));
}
