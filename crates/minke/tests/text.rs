//! What a person sees: help, figures, messages, and text from a model with a tokenizer.

#![expect(clippy::format_push_string, reason = "text for snapshots is short")]

mod common;

use common::{good, minke, minke_with, refused, talking, text, vectors};
use serde_json::{Value, json};

#[test]
fn help_of_every_command() {
    let mut all = String::new();
    for command in [
        "",
        "pretrain",
        "make",
        "chat",
        "generate",
        "serve",
        "score",
        "inspect",
        "sft",
        "grpo",
        "sample",
        "distill",
        "eval",
        "export",
        "quantize",
        "gym",
        "gym list",
        "gym show",
        "gym write",
        "bench",
        "bench infer",
        "bench train",
        "bench grpo",
    ] {
        let mut args: Vec<&str> = command.split_whitespace().collect();
        args.push("--help");
        let help = good(&args);
        assert!(help.contains("\nExamples:\n"), "{command}");
        all.push_str(&format!("$ minke {}\n{help}\n", args.join(" ")));
    }
    insta::assert_snapshot!(all);
}

#[test]
fn arguments_that_are_wrong_are_refused() {
    let mut all = String::new();
    for args in [
        &["generat"][..],
        &["generate", "m"],
        &["generate", "m", "-p", "x", "-n", "0"],
        &["generate", "m", "-p", "x", "--threads", "0"],
        &["generate", "m", "-p", "x", "--temperature", "warm"],
        &["generate", "m", "-p", "x", "--logit-bias", "forty"],
        &["generate", "m", "-p", "x", "--regex", "a", "--grammar", "b"],
        &["serve", "m", "--parallel", "0"],
        &["serve", "m", "--addr", "nowhere"],
        &["serve", "m", "--addr", "9000"],
        &["serve", "m", "--allow-origin", "*"],
        &["generate", "m", "-p", "x", "--raw", "--chat"],
        &["generate", "m", "-p", "x", "--top-logprobs", "3"],
        &["score", "m"],
        &["bench", "infer", "m", "--batch", "-1"],
        &["export", "m", "--out", "x"],
        &["export", "m", "--to", "hf", "--out", "x", "--dtype", "fp4"],
        &["export", "m", "--to", "gguf", "--out", "x"],
        &["export", "m", "--to", "hf", "--out", "x", "--scale-fmt", "ue8m0"],
    ] {
        all.push_str(&format!("$ minke {}\n{}\n", args.join(" "), refused(args)));
    }
    insta::assert_snapshot!(all);
}

/// Before a model is looked for, let alone loaded.
#[test]
fn an_address_that_is_taken_is_told_at_once() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let said = refused(&["serve", "m", "--addr", &addr]);
    assert!(said.contains(&format!("cannot listen on {addr}: ")) && said.contains("hint: --addr "), "{said}");
}

#[test]
fn settings_and_lengths_that_cannot_be_are_refused() {
    let folder = talking();
    let model = text(folder.path());
    let long = "whale ".repeat(2000);
    let numbers = vectors("v3_plain");
    let mut all = String::new();
    for args in [
        &["generate", model, "-p", "x", "--temperature", "-1"][..],
        &["generate", model, "-p", "x", "--top-p", "0"],
        &["generate", model, "-p", "x", "--min-p", "nan"],
        &["generate", model, "-p", "x", "--repetition-penalty", "0"],
        &["generate", model, "-p", "x", "--logit-bias", "999999=1"],
        &["generate", model, "-p", "x", "--stop-id", "999999"],
        &["generate", model, "-p", "x", "-n", "3", "--min-tokens", "4"],
        &["generate", model, "-p", "x", "--regex", "(a"],
        &["generate", model, "-p", "x", "--json-schema", "/nowhere/schema.json"],
        &["generate", model, "-p", "x", "--speculate", "mtp"],
        &["generate", model, "-p", "x", "--speculate", "draft"],
        &["generate", model, "-p", &long],
        &["generate", text(&numbers), "-p", "x"],
        &["chat", text(&numbers)],
        &["chat", model, "--system", "x"],
        &["chat", model, "--think", "on"],
        &["generate", model, "-p", "x", "--chat"],
        &["inspect", model, "--set", "a=b"],
    ] {
        all.push_str(&refused(args));
    }
    let root = text(&numbers).to_owned();
    insta::assert_snapshot!(all.replace(model, "MODEL").replace(&root, "VECTORS"));
}

#[test]
fn the_same_arguments_give_the_same_text() {
    let folder = talking();
    let model = text(folder.path());
    let json = |extra: &[&str]| -> Value {
        let args = [&["generate", model, "-p", "the whale", "-n", "40", "--json"], extra].concat();
        serde_json::from_str(&good(&args)).unwrap()
    };
    let one = json(&["--seed", "11", "--threads", "1"]);
    for threads in ["2", "3"] {
        let other = json(&["--seed", "11", "--threads", threads]);
        assert_eq!((&one["text"], &one["tokens"]), (&other["text"], &other["tokens"]));
        assert_eq!(one["logprobs"], other["logprobs"]);
    }
    assert_ne!(one["text"], json(&["--seed", "8"])["text"]);
    assert_eq!(one["stop_reason"], "max_tokens");
    assert_eq!(one["tokens"].as_array().unwrap().len(), 40);
    for key in ["prefill_tok_s", "decode_tok_s"] {
        assert!(one[key].as_f64().unwrap() > 0.0, "{key}");
    }
    let greedy = json(&["--temperature", "0"]);
    assert_eq!(greedy["text"], json(&["--temperature", "0", "--seed", "9"])["text"]);
    let whole = one["text"].as_str().unwrap();
    let stop: String = whole.chars().skip(10).take(3).collect();
    let stopped = json(&["--seed", "11", "--stop", &stop]);
    assert_eq!(stopped["stop_reason"], "stop_string");
    assert_eq!(stopped["text"].as_str().unwrap(), whole.split(&stop).next().unwrap());
    let id = one["tokens"][7].to_string();
    let stopped = json(&["--seed", "11", "--stop-id", &id]);
    assert_eq!(stopped["stop_reason"], "stop_token");
    assert!(stopped["tokens"].as_array().unwrap().len() <= 7, "{stopped}");
    // what a request says about its tokens
    let steered = json(&["--logit-bias", "70=100", "--top-logprobs", "2", "--min-tokens", "40"]);
    assert_eq!(steered["text"], "W".repeat(40));
    assert_eq!(steered["top_logprobs"].as_array().unwrap().len(), 40);
    let args = ["generate", model, "-p", "why<think>", "-n", "40", "--json", "--think-budget", "3"];
    let thought: Value = serde_json::from_str(&good(&args)).unwrap();
    assert_eq!(thought["thinking"]["closed"], true);
    // a form, and drafts, which change nothing
    let schema = folder.path().join("schema.txt");
    std::fs::write(&schema, r#"{"enum": ["dive", "sing"]}"#).unwrap();
    let form = json(&["--json-schema", text(&schema)]);
    assert!(["\"dive\"", "\"sing\""].contains(&form["text"].as_str().unwrap()), "{form}");
    assert_eq!(form["stop_reason"], "complete");
    let digits = json(&["--regex", "[0-9]{7}", "--speculate", "ngram"]);
    assert!(digits["text"].as_str().unwrap().parse::<u32>().is_ok(), "{digits}");
    // what ends without its form is shown, and is no success; ids of bytes that are characters follow each other
    let eight = format!("{}=-100", 70 - (b'W' - b'8'));
    for (args, shown, why) in [
        (
            &["--regex", "7{50}"][..],
            "7".repeat(40),
            "error: the text ends after 40 tokens, before it has its form\n",
        ),
        (&["--regex", "78", "--logit-bias", &eight], "7".to_owned(), "error: the text cannot go on"),
    ] {
        let run = minke(&[&["generate", model, "-p", "the whale", "-n", "40"], args].concat());
        assert_eq!((run.code, run.out), (1, format!("{shown}\n")), "{}", run.err);
        assert!(run.err.starts_with(why) && run.err.contains("\nhint: "), "{}", run.err);
    }
    assert_eq!(
        json(&["--regex", "7+", "--min-tokens", "40"])["stop_reason"],
        "max_tokens",
        "a form that may end there"
    );
    for how in ["off", "ngram", "draft"] {
        let mut args = vec!["--seed", "11", "--speculate", how];
        if how == "draft" {
            args.extend(["--draft-model", model]);
        }
        let drafted = json(&args);
        assert_eq!((&one["tokens"], &one["logprobs"]), (&drafted["tokens"], &drafted["logprobs"]));
        let drafts = &drafted["speculation"];
        assert_eq!(how == "draft", drafts["tokens_per_call"].as_f64().unwrap() > 2.0, "{how}: {drafts}");
        assert!(how != "off" || drafts["drafted"] == 0);
    }
    // plain output is the continuation alone, and a prompt may come over a pipe
    let plain = good(&["generate", model, "-p", "the whale", "-n", "40", "--seed", "11"]);
    assert_eq!(plain, format!("{whole}\n"));
    let args = ["generate", model, "-p", "-", "-n", "40", "--seed", "11"];
    assert_eq!(minke_with(&args, "the whale").out, plain);
}

#[test]
fn chat_continues_what_is_typed() {
    let folder = talking();
    let model = text(folder.path());
    let args = ["chat", model, "-n", "20", "--seed", "5"];
    let run = minke_with(&args, "the whale\n/set temperature=0.5\n/help\n\n/exit\nnever\n");
    assert_eq!(run.code, 0, "{}", run.err);
    // what fails ends it, and nothing behind it is taken
    for (typed, why) in [
        ("/set temperature x", "temperature: expected a number, got `x`"),
        ("/nonsense", "unknown command `/nonsense`"),
        ("/think on", "this is a base model"),
        ("/system x", "this is a base model"),
    ] {
        let run = minke_with(&args, &format!("{typed}\nthe whale\n"));
        assert_eq!((run.code, run.out.as_str()), (2, ""), "{typed}: {}", run.err);
        assert!(run.err.contains(&format!("error: {why}")), "{typed}: {}", run.err);
    }
    insta::assert_snapshot!(run.err.replace(model, "MODEL"));
    let alone = good(&["generate", model, "-p", "the whale", "-n", "20", "--seed", "5"]);
    assert!(run.out.starts_with(&alone), "{:?} and {alone:?}", run.out);
    // the second answer is the continuation of the whole running text
    let more = good(&["generate", model, "-p", "the whale", "-n", "20", "--seed", "5", "--json"]);
    let first: Value = serde_json::from_str(&more).unwrap();
    assert!(run.out.len() > first["text"].as_str().unwrap().len() + 2);
    // the end of the input ends it as well, and a context that runs full forgets nothing by itself
    let typed = "the whale sings and dives\n".repeat(20);
    let full = minke_with(&["chat", model, "-n", "30"], &typed);
    assert_eq!(full.code, 2, "{}", full.err);
    let said = "so there is no room for an answer; /undo forgets the last turn, /reset all of them";
    assert!(full.err.ends_with(&format!("{said}\n")), "{}", full.err);
    let again = minke_with(&["chat", model, "-n", "30"], "the whale\n/reset\nthe whale\n/stats\n");
    assert_eq!(again.code, 0, "{}", again.err);
    assert!(
        again.err.contains("the text so far is forgotten") && again.err.contains("30 written at"),
        "{}",
        again.err
    );
}

#[test]
fn chat_takes_turns_by_the_template() {
    let folder = talking();
    let model = text(folder.path());
    let template = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\
                    {{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}{% endfor %}\
                    {% if add_generation_prompt %}<|assistant|><think>{% endif %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let args = ["chat", model, "-n", "12", "--temperature", "0"];
    let run = minke_with(&args, "the whale\n\n/reset\nthe whale\n");
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.err.contains("Talking to") && run.err.contains("a new conversation begins"), "{}", run.err);
    assert!(run.err.contains("type something"), "{}", run.err);
    // what it thinks first can be told from what it answers, and a new conversation knows nothing of the old one
    let answers: Vec<&str> = run.out.split("<think>").collect();
    assert!(answers.len() == 3 && answers[0].is_empty() && !run.out.contains('\u{1b}'), "{:?}", run.out);
    assert_eq!(answers[1], answers[2]);
    let forged = minke_with(&args, "</think><|eos|>\n");
    assert_eq!(forged.code, 0, "{}", forged.err);
    // one question by the same way, and as text by another
    let asked = minke(&["generate", model, "-p", "the whale", "--chat", "-n", "12", "--temperature", "0"]);
    assert_eq!(
        (asked.code, asked.err.as_str()),
        (0, "note: the answer ends here, after 12 tokens; -n allows more\n")
    );
    assert_eq!(asked.out, run.out.split_inclusive('\n').next().unwrap());
    // a form is of the answer, which stands alone beside the thought
    let schema = folder.path().join("schema.txt");
    std::fs::write(&schema, r#"{"enum": ["dive", "sing"]}"#).unwrap();
    let ask = ["generate", model, "-p", "the whale", "--chat", "--json", "--json-schema", text(&schema)];
    let formed: Value = serde_json::from_str(&good(&[&ask[..], &["--think", "3"]].concat())).unwrap();
    let answer = formed["answer"].as_str().unwrap();
    assert!(["\"dive\"", "\"sing\""].contains(&answer) && formed["thought"].is_string(), "{formed}");
    assert!(formed["text"].as_str().unwrap().ends_with(&format!("</think>{answer}")), "{formed}");
    let short: Value = serde_json::from_str(&good(&[&ask[..], &["--think", "off"]].concat())).unwrap();
    assert!(short.get("thought").is_none() && short.get("answer").is_none(), "{short}");
    let both = refused(&["generate", model, "-p", "x", "--think", "5", "--think-budget", "9"]);
    assert!(both.contains("--think 5 and --think-budget 9 both bound the thought"), "{both}");
    // nor is a full context passed over
    let full = minke(&["generate", model, "-p", &"the whale ".repeat(20), "--raw", "-n", "1000"]);
    assert!(
        full.code == 0 && full.err.contains("note: the text ends here: the model's context of"),
        "{}",
        full.err
    );
    let idle = minke(&["generate", model, "-p", "x", "--raw", "-n", "1", "--think-budget", "9"]);
    assert_eq!(idle.err, "note: --think-budget had no effect: the text has no thought\n");
    let whole = ["generate", model, "-p", "the whale", "--chat", "--temperature", "0", "--json"];
    let whole: Value = serde_json::from_str(&good(&whole)).unwrap();
    assert!(whole["stop_reason"] == "stop_token" || whole["stop_reason"] == "context", "{whole}");
    let plain = minke(&["generate", model, "-p", "the whale", "-n", "12", "--temperature", "0"]);
    assert!(plain.err.contains("--chat asks it as a question") && plain.out != asked.out, "{}", plain.err);
    let raw = minke(&["generate", model, "-p", "the whale", "--raw", "-n", "12", "--temperature", "0"]);
    assert_eq!((raw.out, raw.err.as_str()), (plain.out, ""));
    std::fs::write(folder.path().join("chat_template.jinja"), "{% for").unwrap();
    let broken = minke_with(&args, "the whale\n");
    assert!(broken.code == 2 && broken.err.contains("chat_template.jinja: line 1"), "{}", broken.err);
}

/// A template that writes the tokens of the test's tokenizer and takes an instruction.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}\
                        {% if add_generation_prompt %}<|assistant|>{% endif %}";

/// The library's example says what the program says. It is built with all tests, not with those of one crate.
#[test]
fn the_example_in_ten_lines_says_the_same() {
    let tests = std::env::current_exe().unwrap();
    let built = tests.parent().unwrap().with_file_name("examples");
    let example = built.join(format!("ten_lines{}", std::env::consts::EXE_SUFFIX));
    if !example.is_file() {
        println!("skipped: cargo build --release --example ten_lines -p minke-infer");
        return;
    }
    let folder = talking();
    // two answers of any length fit
    let config = folder.path().join("config.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    value["max_position_embeddings"] = 16_384.into();
    std::fs::write(config, value.to_string()).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let model = text(folder.path());
    let said = std::process::Command::new(example).arg(model).output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let said = String::from_utf8(said.stdout).unwrap();
    let ask = ["generate", model, "--chat", "-p", "What is 56365+18356?", "--temperature", "0.6"];
    let asked = good(&ask);
    let whole: Value = serde_json::from_str(&good(&[&ask[..], &["--json"]].concat())).unwrap();
    let first =
        format!("{asked}{} tokens; without its thought it said: ", whole["tokens"].as_array().unwrap().len());
    assert!(asked.trim().len() > 1 && said.starts_with(&first), "{said:?}\n{asked:?}\n{whole}");
    // the answer again, and another to a second question
    let rest = said[first.len()..].strip_prefix(asked.trim());
    assert!(rest.is_some_and(|rest| !rest.trim().is_empty()), "{said:?}\n{asked:?}");
}

#[test]
fn what_is_refused_shows_nothing() {
    let folder = talking();
    let model = text(folder.path());
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    // not even that a thought begins
    let long = "whale ".repeat(2000);
    let error = refused(&["generate", model, "--think", "on", "-p", &long]);
    assert!(error.contains("do not fit into the model's context"), "{error}");
    let form =
        ["generate", model, "--think", "auto", "--regex", "<think>x</think>y", "--json", "-p", "whale"];
    let answer: Value = serde_json::from_str(&good(&form)).unwrap();
    assert_eq!((&answer["text"], answer.get("thought")), (&json!("<think>x</think>y"), None));
}

#[test]
fn chat_has_commands() {
    let folder = talking();
    let model = text(folder.path());
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let saved = folder.path().join("talk.json");
    let args = ["chat", model, "-n", "8", "--temperature", "0.9", "--seed", "3", "--system", "sing"];
    let typed = format!(
        "/system\nthe whale\n/retry\n/save {0}\n/undo\n/load {0}\n/save! {0}\n/think 4\n/set seed 9\n\
         /system \"\"\n/system\n/help\n",
        text(&saved)
    );
    let run = minke_with(&args, &typed);
    assert_eq!(run.code, 0, "{}", run.err);
    insta::assert_snapshot!(run.err.replace(model, "MODEL"));
    // an answer that is asked for again is another, and what was saved is the last one
    let answers: Vec<&str> = run.out.lines().collect();
    assert_ne!(answers[0], answers[1], "{:?}", run.out);
    let talk: Value = serde_json::from_slice(&std::fs::read(&saved).unwrap()).unwrap();
    let roles: Vec<&str> =
        talk["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant"]);
    assert_eq!(talk["messages"][2]["content"].as_str().unwrap().trim_end(), answers[1].trim_end());
    // a conversation that is taken up again goes on as it would have, and lines are joined
    let on = |args: &[&str], typed: &str| minke_with(args, typed).out;
    let args = ["chat", model, "-n", "8", "--temperature", "0"];
    let whole = on(&args, &format!("the whale\n/save! {}\nand then\\\nmore\n", text(&saved)));
    let later = on(&[&args[..], &["--load", text(&saved)]].concat(), "\"\"\"\nand then\nmore\n\"\"\"\n");
    assert!(whole.ends_with(&later) && later.len() > 1, "{whole:?} and {later:?}");
    for (typed, why) in [
        ("/undo", "there is no turn to undo"),
        ("/retry", "there is no turn to answer again"),
        ("/think much", "think: expected on, off, auto or a number of tokens, got `much`"),
        ("/think budget", "think: expected a number of tokens behind `budget`, as in budget 200"),
        ("/sytem be brief", "unknown command `/sytem`; is it /system?"),
        (&format!("/load {}.none", text(&saved)), "No such file"),
        (&format!("/save {}", text(&saved)), "is there already; /save! replaces it"),
        ("/exot", "unknown command `/exot`"),
    ] {
        let run = minke_with(&args, &format!("{typed}\n"));
        assert!(run.code == 2 && run.err.contains(why), "{typed}: {}", run.err);
    }
    std::fs::write(&saved, r#"{"messages": [{"role": "user"}]}"#).unwrap();
    let error = refused(&["chat", model, "--load", text(&saved)]);
    assert!(error.contains("talk.json: `messages[0].content`: expected a text, got nothing"), "{error}");
}

#[test]
fn inspect_counts_what_is_there() {
    let folder = vectors("v3_mtp1");
    let shown = good(&["inspect", text(&folder)]).replace(text(&folder), "FOLDER");
    insta::assert_snapshot!(shown);
    let report: Value = serde_json::from_str(&good(&["inspect", text(&folder), "--json"])).unwrap();
    let total: u64 =
        report["tensors"].as_array().unwrap().iter().map(|t| t["parameters"].as_u64().unwrap()).sum();
    let parameters = &report["parameters"];
    assert_eq!(total, parameters["total"].as_u64().unwrap() + parameters["mtp"].as_u64().unwrap());
    assert_eq!(report["files"]["missing"], 0);
    assert_eq!(report["files"]["unknown"], 0);
}

#[test]
fn inspect_reads_recipes() {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/bench-a.toml");
    let report: Value = serde_json::from_str(&good(&["inspect", recipe, "--json"])).unwrap();
    assert_eq!(report["context"], 256);
    let millions = |key: &str| (report["parameters"][key].as_f64().unwrap() / 1e5).round() / 10.0;
    // 3.3 without the embedding, of which a token only looks up a row
    assert_eq!((millions("total"), millions("active"), millions("embedding")), (7.4, 4.1, 0.8));
    let larger: Value =
        serde_json::from_str(&good(&["inspect", recipe, "--set", "model.num_hidden_layers=7", "--json"]))
            .unwrap();
    assert_eq!(larger["layers"], 7);
    let coded: Value =
        serde_json::from_str(&good(&["inspect", recipe, "--set", "precision=fp8", "--json"])).unwrap();
    let precision = |report: &Value| report["training"]["precision"].as_str().unwrap().to_owned();
    assert_eq!((precision(&report), precision(&coded)), ("bf16".to_owned(), "fp8".to_owned()));
    let wide: Value =
        serde_json::from_str(&good(&["inspect", recipe, "--set", "train.moments=f32", "--json"])).unwrap();
    for (kind, smaller, larger) in
        [("activations_bytes", &coded, &report), ("optimizer_bytes", &report, &wide)]
    {
        let bytes = |report: &Value| report["training"]["memory"][kind].as_u64().unwrap();
        assert!(bytes(smaller) < bytes(larger), "{kind}");
    }
    assert_eq!(
        report["recipe"]["model"]["n_routed_experts"],
        report["recipe"]["model"]["num_experts_per_tok"].as_u64().unwrap() * 4
    );
    let shown = good(&["inspect", recipe]);
    for part in
        ["6 heads of 32 + 16 rotated", "16 experts of width 96, 4 a token", "adamw, lr ", " steps to warm up"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    // the whole of it is a recipe that says the same
    let scratch = tempfile::tempdir().unwrap();
    let whole = scratch.path().join("whole.toml");
    let resolved = good(&["inspect", recipe, "--resolved"]);
    std::fs::write(&whole, &resolved).unwrap();
    let plain = |recipe: &str| recipe.replace("  # derived", "");
    assert!(resolved.contains("# derived"));
    assert_eq!(plain(&resolved), plain(&good(&["inspect", text(&whole), "--resolved"])));
    let stages = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/tiny-r1.toml");
    for command in [&["inspect"][..], &["bench", "infer"], &["pretrain"], &["grpo"]] {
        let error = refused(&[command, &[stages]].concat());
        assert!(error.contains("tiny-r1.toml is a recipe for `minke make`"), "{error}");
        let reads = format!("`minke {}` reads pretrain recipes", command.join(" "));
        assert_eq!(error.contains(&reads), !["pretrain", "grpo"].contains(&command[0]), "{error}");
    }
    let error = refused(&["inspect", recipe, "--set", "model.n_routed_expert=8"]);
    let gone = refused(&["inspect", "/nonexistent-minke/a.toml"]);
    insta::assert_snapshot!(format!("{}\n{gone}", error.replace(recipe, "RECIPE")));
}

#[test]
fn exported_models_are_models() {
    let folder = talking();
    let (model, scratch) = (text(folder.path()), tempfile::tempdir().unwrap());
    let (fp8, wide) = (scratch.path().join("fp8"), scratch.path().join("f32"));
    let args = ["export", model, "--to", "hf", "--dtype", "fp8", "--scale-fmt", "ue8m0", "--out", text(&fp8)];
    let shown = good(&args);
    let root = text(scratch.path());
    let hide = |text: &str| text.replace(model, "MODEL").replace(root, "OUT");
    let mut all = format!("{}\n{}\n", hide(&shown), hide(&refused(&args)));
    all.push_str(&hide(&refused(&[&args[..8], &["--out", model, "--force"]].concat())));
    all.push_str(&format!("\n{}", hide(&good(&["inspect", text(&fp8)]))));
    insta::assert_snapshot!(all);
    let report: Value = serde_json::from_str(&good(&[&args[..], &["--force", "--json"]].concat())).unwrap();
    assert_eq!((&report["dtype"], &report["scale_fmt"]), (&"fp8".into(), &"ue8m0".into()));
    assert_eq!(report["kept"], 0);
    assert!((0.01..0.05).contains(&report["largest_error"]["relative"].as_f64().unwrap()));
    let bytes = std::fs::metadata(fp8.join("model.safetensors")).unwrap().len();
    assert!((1..bytes).contains(&report["bytes"].as_u64().unwrap()));
    good(&["export", text(&fp8), "--to", "hf", "--dtype", "f32", "--out", text(&wide)]);
    let generate = |folder| {
        let args = ["generate", folder, "-p", "the whale", "-n", "30", "--seed", "4", "--precision", "f32"];
        good(&args)
    };
    assert_eq!(generate(text(&fp8)), generate(text(&wide)));
}

#[test]
fn inspect_foretells_what_training_needs() {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/bench-a.toml");
    let report = |set: &[&str]| -> Value {
        serde_json::from_str(&good(&[&["inspect", recipe, "--json", "--threads", "1"], set].concat()))
            .unwrap()
    };
    let (all, twice) = (report(&[]), report(&["--set", "train.recompute=layer"]));
    let bytes = |report: &Value, key: &str| report["training"]["memory"][key].as_u64().unwrap();
    assert_eq!(bytes(&all, "weights_bytes"), 4 * 7_378_832);
    // two moments in bf16 of everything but the biases of routers
    assert_eq!(bytes(&all, "optimizer_bytes"), bytes(&all, "weights_bytes") - 4 * 80);
    assert!(bytes(&all, "gradients_bytes") < bytes(&all, "weights_bytes"));
    assert!(bytes(&twice, "activations_bytes") < bytes(&all, "activations_bytes") / 2);
    assert!(bytes(&twice, "peak_bytes") < bytes(&all, "peak_bytes"));
    assert!(all["training"]["time"]["step_s"].as_f64().unwrap() > 0.0);
    let shown = good(&["inspect", recipe]);
    for said in ["training here", "peak memory", "activations", "tokens/s", "whole run"] {
        assert!(shown.contains(said), "{shown}");
    }
}

#[test]
fn what_does_not_fit_into_memory_is_refused() {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/bench-a.toml");
    let large = ["--set", "train.batch_size=65536", "--set", "train.sequence_length=4096"];
    let large = [&large[..], &["--set", "train.tokens=1000M"]].concat();
    for command in [&["inspect", recipe][..], &["bench", "train", recipe]] {
        let run = minke(&[command, &large].concat());
        assert_eq!(run.code, 2, "{}", run.err);
        for said in ["GiB are available", "train.recompute = \"layer\"", "train.batch_size = ", "hint: "] {
            assert!(run.err.contains(said), "{said}: {}", run.err);
        }
    }
}

#[test]
fn bench_infer_has_its_figures() {
    let folder = vectors("v3_plain");
    let args =
        ["bench", "infer", text(&folder), "--prefill", "40", "--decode", "8", "--batch", "3", "--runs", "1"];
    let report: Value =
        serde_json::from_str(&good(&[&args[..], &["--threads", "1", "--json"]].concat())).unwrap();
    for key in ["prefill_tok_s", "decode_tok_s", "peak_rss_bytes", "gemm_peak_gflops", "read_bandwidth_gb_s"]
    {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert_eq!((report["threads"].as_u64(), report["batch"].as_u64()), (Some(1), Some(3)));
    // speed is asked for at a length, and the length that a model was trained for does not change it
    let longer =
        minke(&["bench", "infer", text(&folder), "--prefill", "300", "--decode", "9", "--runs", "1"]);
    assert_eq!(longer.code, 0, "{}", longer.err);
    assert!(
        longer.err.starts_with("note: ") && longer.out.contains("1 x (300 read + 9 written)"),
        "{}",
        longer.err
    );
    // a model as small as this one lives in the caches, so its share of the memory's bandwidth may exceed one
    for key in ["prefill_share_of_gemm_peak", "decode_share_of_bandwidth"] {
        let share = report[key].as_f64().unwrap();
        assert!(share > 0.0 && share < 100.0, "{key}: {share}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    use std::process::{Command, Stdio};
    let folder = talking();
    let mut child = Command::new(env!("CARGO_BIN_EXE_minke"))
        .args(["generate", text(folder.path()), "-p", "the whale", "-n", "200"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(minke(&["--version"]).code, 0);
}
