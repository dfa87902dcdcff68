//! `minke chat` in a terminal: a pseudo-terminal stands in for the person's.

#![cfg(target_os = "linux")]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{talking, text};
use minke_data::{Tokenizer, TrainOptions};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_mins(1);
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}\
                        {% if add_generation_prompt %}<|assistant|><think>{% endif %}";

/// A run of `minke` in a terminal.
struct Screen {
    child: Child,
    keyboard: File,
    /// All that was written so far.
    shown: Arc<Mutex<Vec<u8>>>,
    /// What was waited for already.
    seen: usize,
}

impl Screen {
    /// A chat.
    fn open(model: &str, data: &Path, extra: &[&str]) -> Self {
        Self::run(&[&["chat", model], extra].concat(), data, "")
    }

    fn run(args: &[&str], data: &Path, no_color: &str) -> Self {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal, size).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let end = || File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_minke"))
            .args(args)
            .env("NO_COLOR", no_color)
            .env("TERM", "xterm-256color")
            .env("XDG_DATA_HOME", data)
            .env("HF_HOME", "/nonexistent-minke-hub")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let keyboard = File::from(terminal);
        let (mut screen, shown) = (keyboard.try_clone().unwrap(), Arc::new(Mutex::new(Vec::new())));
        let copy = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // it ends with an error when the program has closed its end
            while let Ok(n @ 1..) = screen.read(&mut buffer) {
                copy.lock().unwrap().extend_from_slice(&buffer[..n]);
            }
        });
        Self { child, keyboard, shown, seen: 0 }
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until a text is shown, behind the last that was waited for; gives what came until then.
    fn wait_for(&mut self, expected: &str) -> String {
        let begin = Instant::now();
        loop {
            let shown = self.shown.lock().unwrap().clone();
            let new = String::from_utf8_lossy(&shown[self.seen..]).into_owned();
            if let Some(at) = new.find(expected) {
                self.seen = (self.seen + at + expected.len()).min(shown.len());
                return new[..at].to_owned();
            }
            assert!(begin.elapsed() < PATIENCE, "{expected:?} does not come: {new:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Says something and waits for the next prompt.
    fn say(&mut self, keys: &str) -> String {
        self.press(keys);
        self.wait_for("tokens (")
    }

    fn end(mut self) -> i32 {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            if begin.elapsed() > PATIENCE {
                self.child.kill().unwrap();
                panic!("it does not end: {}", String::from_utf8_lossy(&self.shown.lock().unwrap()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_person_talks_in_a_terminal() {
    let folder = talking();
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let (model, data) = (text(folder.path()).to_owned(), tempfile::tempdir().unwrap());
    let args = ["-n", "6", "--temperature", "0", "--verbose"];
    let mut screen = Screen::open(&model, data.path(), &args);
    screen.wait_for("/help lists the commands.");
    // thoughts are dim, and so are the figures
    let answer = screen.say("the whale\r");
    assert!(answer.contains("\u{1b}[2m") && answer.contains("6 written at"), "{answer:?}");
    // wide characters, edited in the middle
    screen.say("鯨🐋潜\u{1b}[D\u{1b}[DX\r");
    // lines that are joined in four ways
    screen.say("one\\\rtwo\r");
    screen.say("three\u{1b}\rfour\r");
    screen.say("\"\"\"\rfive\r\rsix\r\"\"\"\r");
    screen.say("\u{1b}[200~seven\neight\u{1b}[201~\r");
    let saved = folder.path().join("talk.json");
    screen.press(&format!("/save {}\r", text(&saved)));
    screen.wait_for("messages written to");
    let talk: Value = serde_json::from_slice(&std::fs::read(&saved).unwrap()).unwrap();
    let said: Vec<&str> = talk["messages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|message| message["role"] == "user")
        .map(|message| message["content"].as_str().unwrap())
        .collect();
    assert_eq!(said, ["the whale", "鯨X🐋潜", "one\ntwo", "three\nfour", "five\n\nsix", "seven\neight"]);
    screen.press("/sta\t\r");
    screen.wait_for("context ");
    // a line is thrown away, and twice at an empty prompt leaves
    screen.press("not said\u{3}");
    screen.wait_for("(Ctrl-C again, /exit or Ctrl-D leaves)");
    screen.press("/reset\r");
    screen.wait_for("a new conversation begins");
    screen.press("\u{3}");
    screen.wait_for("(Ctrl-C again");
    screen.press("\u{3}");
    assert_eq!(screen.end(), 0);
    // the next run remembers, and nobody else can read what was said
    let history = data.path().join("minke/chat_history");
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&history).unwrap());
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    let mut screen = Screen::open(&model, data.path(), &args);
    screen.wait_for("/help lists the commands.");
    screen.press("\u{1b}[A\u{1b}[A\u{1b}[A\u{1b}[A");
    screen.say("\r");
    screen.press(&format!("/save {}\r", text(&saved)));
    screen.wait_for("is there already; /save! replaces it");
    screen.press(&format!("/save! {}\r", text(&saved)));
    screen.wait_for("messages written to");
    let talk: Value = serde_json::from_slice(&std::fs::read(&saved).unwrap()).unwrap();
    assert_eq!(talk["messages"][0]["content"], "seven\neight");
    screen.press("\u{4}");
    assert_eq!(screen.end(), 0);
    // nor does it have to remember
    let (before, last) = (std::fs::read(&history).unwrap(), [&args[..], &["--no-history"]].concat());
    let mut screen = Screen::open(&model, data.path(), &last);
    screen.wait_for("/help lists the commands.");
    screen.say("forget this\r");
    screen.press("\u{4}");
    assert_eq!(screen.end(), 0);
    assert_eq!(std::fs::read(&history).unwrap(), before);
}

#[test]
fn one_answer_is_shown_as_in_a_chat() {
    let folder = talking();
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let data = tempfile::tempdir().unwrap();
    let args =
        ["generate", text(folder.path()), "--chat", "-p", "the whale", "-n", "6", "--temperature", "0"];
    let mut screen = Screen::run(&args, data.path(), "");
    let answer = screen.wait_for("note: the answer ends here, after 6 tokens; -n allows more");
    assert!(answer.starts_with("\u{1b}[2m") && !answer.contains("<think>"), "{answer:?}");
    assert_eq!(screen.end(), 0);
    // without styles marks stand for them
    let mut screen = Screen::run(&args, data.path(), "1");
    let answer = screen.wait_for("written at");
    assert!(answer.starts_with("<think>") && !answer.contains('\u{1b}'), "{answer:?}");
    assert_eq!(screen.end(), 0);
}

#[test]
fn a_turn_that_the_model_has_no_rows_for_does_not_end_the_conversation() {
    let folder = talking();
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    // ids that the head lacks, for a word of their own
    let sample = ["the whale dives and the whale sings\n".repeat(20), "krill krill krill krill\n".repeat(90)];
    let options = TrainOptions { vocab_size: 320, ..TrainOptions::default() };
    let larger = Tokenizer::train(&sample, &options).unwrap();
    let own = Tokenizer::load(folder.path().join("tokenizer.json")).unwrap();
    let lacks = |text: &str| larger.encode(text).unwrap().iter().any(|id| *id as usize >= own.vocab_size());
    let bad = ["sings", " sings", "dives and", "whale sings", "krill krill"]
        .into_iter()
        .find(|text| lacks(text))
        .unwrap();
    assert!(!lacks("x"));
    larger.save(folder.path()).unwrap();
    let data = tempfile::tempdir().unwrap();
    let mut screen =
        Screen::open(text(folder.path()), data.path(), &["-n", "4", "--temperature", "0", "--verbose"]);
    screen.wait_for("the others cannot be used");
    screen.wait_for("/help lists the commands.");
    screen.press(&format!("{bad}\r"));
    screen.wait_for("the tokenizer is not this model's");
    screen.press("x\r");
    screen.wait_for("tokens (");
    screen.press("/exit\r");
    assert_eq!(screen.end(), 0);
}

#[test]
fn ctrl_c_stops_an_answer_and_not_the_program() {
    let folder = talking();
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    // room for an answer that takes its time
    let config = folder.path().join("config.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    value["max_position_embeddings"] = 1_000_000.into();
    std::fs::write(&config, value.to_string()).unwrap();
    let data = tempfile::tempdir().unwrap();
    let mut screen = Screen::open(text(folder.path()), data.path(), &["--temperature", "1", "--verbose"]);
    screen.wait_for("/help lists the commands.");
    // the model may end an answer before it is stopped, which is no reason to end the program either
    let mut stopped = false;
    for turn in 0..50 {
        screen.press(&format!("whale {turn}\r"));
        screen.wait_for("\u{1b}[2m");
        kill_process(Pid::from_child(&screen.child), Signal::INT).unwrap();
        stopped = screen.wait_for("tokens (").contains("(stopped)");
        if stopped {
            break;
        }
    }
    assert!(stopped);
    screen.press("/stats\r");
    screen.wait_for("written at");
    screen.press("/exit\r");
    assert_eq!(screen.end(), 0);
}
