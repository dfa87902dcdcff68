//! A server on a real socket, asked by a client that knows nothing of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use minke_cpu::Cpu;
use minke_data::tokenizer::TrainOptions;
use minke_data::{ChatTemplate, Tokenizer};
use minke_infer::{Handle, Sampling, Service, ServiceOptions, Speculation};
use minke_model::{Config, DType, Model, Precision};
use minke_serve::{Finished, Limits, Options, ServeError, Served, serve};
use serde_json::{Value, json};

const CONTEXT: usize = 1024;

fn tokenizer() -> Tokenizer {
    let sample = vec!["the whale dives and the whale sings: ünder the wäve 鯨\n".repeat(20)];
    Tokenizer::train(&sample, &TrainOptions { vocab_size: 320, ..TrainOptions::default() }).unwrap()
}

/// A model whose weights are drawn.
fn model(rows: usize) -> Model {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors");
    let text = std::fs::read_to_string(vectors.join("v3_plain/config.json")).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    value["vocab_size"] = rows.into();
    value["initializer_range"] = 0.3.into();
    value["max_position_embeddings"] = CONTEXT.into();
    Model::random(Config::from_json(&value).unwrap(), Precision::uniform(DType::Bf16), 11)
}

struct Server {
    addr: SocketAddr,
    handle: Handle,
    /// Requests that are over.
    log: Arc<Mutex<Vec<Finished>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<Result<(), ServeError>>>,
    service: Option<Service>,
}

impl Server {
    fn start(options: ServiceOptions, limits: Limits) -> Self {
        Self::of(ChatTemplate::named("minke").unwrap(), options, limits)
    }

    fn of(template: ChatTemplate, options: ServiceOptions, limits: Limits) -> Self {
        let tokenizer = tokenizer();
        let model = model(tokenizer.vocab_size());
        let service = Service::start(model, Cpu::detect(2), Some(tokenizer.clone()), None, options).unwrap();
        let served = Served {
            speculation: Speculation::Auto,
            name: "whale".to_owned(),
            bos: tokenizer.bos(),
            stop_ids: tokenizer.eos().into_iter().collect(),
            template: Some(template),
            tokenizer,
            defaults: Sampling::default(),
        };
        let (handle, stop) = (service.handle(), Arc::new(AtomicBool::new(false)));
        let log = Arc::new(Mutex::new(Vec::new()));
        let kept = log.clone();
        let options = Options {
            limits,
            origins: ["http://localhost:3000", "https://whale.example:8443"].map(str::to_owned).to_vec(),
            log: Arc::new(move |finished| kept.lock().unwrap().push(finished.clone())),
        };
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        let thread = std::thread::spawn({
            let (handle, stop) = (handle.clone(), stop.clone());
            move || serve(listener, handle, served, options, &stop)
        });
        Self { addr, handle, log, stop, thread: Some(thread), service: Some(service) }
    }

    fn plain() -> Self {
        Self::start(ServiceOptions::default(), Limits::default())
    }

    fn send(&self, head: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        let host = if head.contains("\r\nhost: ") { "" } else { "host: localhost\r\n" };
        let head = format!("{head}\r\n{host}connection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        // a body that is refused need not be read
        let _ = stream.write_all(body);
        stream
    }

    fn begin(&self, path: &str, body: &Value) -> TcpStream {
        let head = format!("POST {path} HTTP/1.1\r\ncontent-type: application/json");
        self.send(&head, body.to_string().as_bytes())
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = answer(self.begin(path, body));
        (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
    }

    fn get(&self, path: &str) -> (u16, Value) {
        let (status, text) = answer(self.send(&format!("GET {path} HTTP/1.1"), b""));
        (status, serde_json::from_str(&text).unwrap())
    }

    /// The data of a stream, which must end as it should.
    fn streamed(&self, path: &str, body: &Value) -> Vec<Value> {
        let (status, text) = answer(self.begin(path, body));
        assert_eq!(status, 200, "{text}");
        let lines = text.lines().filter(|line| !line.is_empty());
        let mut data: Vec<&str> = lines.map(|line| line.strip_prefix("data: ").expect(line)).collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.into_iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The last request that is over, once there are so many.
    fn logged(&self, count: usize) -> Finished {
        let begin = Instant::now();
        loop {
            if let Some(last) = self.log.lock().unwrap().get(count - 1) {
                return last.clone();
            }
            assert!(begin.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn idle(&self) {
        let begin = Instant::now();
        while self.handle.stats().running + self.handle.stats().waiting > 0 {
            assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", self.handle.stats());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

/// Status and body of a response.
fn answer(stream: TcpStream) -> (u16, String) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split_whitespace().nth(1).unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
    let mut chunked = false;
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).unwrap();
        chunked |= line.to_ascii_lowercase().starts_with("transfer-encoding: chunked");
    }
    let mut body = Vec::new();
    if !chunked {
        reader.read_to_end(&mut body).unwrap();
        return (status, String::from_utf8(body).unwrap());
    }
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        let size = usize::from_str_radix(line.trim(), 16).unwrap();
        let mut chunk = vec![0; size + 2];
        reader.read_exact(&mut chunk).unwrap();
        if size == 0 {
            return (status, String::from_utf8(body).unwrap());
        }
        body.extend_from_slice(&chunk[..size]);
    }
}

fn chat(extra: &Value) -> Value {
    let mut body = json!({"model": "whale", "messages": [{"role": "user", "content": "the whale"}],
        "max_tokens": 24, "seed": 3});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// The text of a choice, put together from chunks.
fn joined(chunks: &[Value], index: usize, field: &str) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let own = choices.filter(|choice| choice["index"] == index);
    own.filter_map(|choice| choice["delta"][field].as_str().or(choice[field].as_str())).collect()
}

#[test]
fn a_stream_says_what_a_whole_answer_says_alone_and_among_others() {
    let server = Server::plain();
    let (status, whole) = server.post(CHAT, &chat(&json!({"n": 3, "logprobs": true, "top_logprobs": 2})));
    assert_eq!(status, 200, "{whole}");
    assert_eq!(whole["object"], "chat.completion");
    let prompt = whole["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(prompt > 5 && whole["usage"]["completion_tokens"] == 3 * 24, "{whole}");
    assert_eq!(whole["usage"]["total_tokens"], prompt + 72);
    assert!(whole["timings"]["draft_n"].as_u64() >= whole["timings"]["draft_n_accepted"].as_u64(), "{whole}");
    let said = |choice: &Value| {
        let part = |name: &str| choice["message"][name].as_str().unwrap_or_default().to_owned();
        (part("reasoning_content"), part("content"))
    };
    let texts: Vec<_> = (0..3).map(|i| said(&whole["choices"][i])).collect();
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
    let entry = &whole["choices"][1]["logprobs"]["content"][5];
    assert!(entry["logprob"].as_f64().unwrap() < 0.0);
    assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(whole["choices"][0]["logprobs"]["content"].as_array().unwrap().len(), 24);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");

    let options = json!({"n": 3, "stream": true, "stream_options": {"include_usage": true}});
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let chunks = server.streamed(CHAT, &chat(&options));
                assert_eq!(chunks[0]["object"], "chat.completion.chunk");
                assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
                for (index, text) in texts.iter().enumerate() {
                    let got =
                        (joined(&chunks, index, "reasoning_content"), joined(&chunks, index, "content"));
                    assert_eq!(got, *text);
                }
                let last = chunks.last().unwrap();
                assert_eq!(last["choices"], json!([]));
                assert_eq!(last["usage"]["completion_tokens"], 72);
            });
        }
    });
    // another seed, another answer
    assert_ne!(said(&server.post(CHAT, &chat(&json!({"seed": 4}))).1["choices"][0]), texts[0]);
}

#[test]
fn texts_are_continued() {
    let server = Server::plain();
    let body = json!({"prompt": ["the whale", "sings"], "n": 2, "max_tokens": 12, "temperature": 0,
        "logprobs": 3, "frequency_penalty": 0.4, "logit_bias": {"40": -100, "41": 1.5}});
    let (status, whole) = server.post(TEXT, &body);
    assert_eq!(status, 200, "{whole}");
    assert_eq!(
        (&whole["object"], whole["choices"].as_array().unwrap().len()),
        (&json!("text_completion"), 4)
    );
    let choice = |i: usize| &whole["choices"][i];
    assert_eq!(choice(0)["text"], choice(1)["text"], "the likeliest is the likeliest");
    assert_ne!(choice(0)["text"], choice(2)["text"]);
    let log_probs = &choice(2)["logprobs"];
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(log_probs[name].as_array().unwrap().len(), 12, "{name}");
    }
    // the same as ids, as a stream, and up to a string
    let text = choice(0)["text"].as_str().unwrap();
    let tokenizer = tokenizer();
    let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
    ids.extend(tokenizer.encode("the whale").unwrap());
    let mut body = json!({"prompt": ids, "max_tokens": 12, "temperature": 0, "stream": true,
        "frequency_penalty": 0.4, "logit_bias": {"40": -100, "41": 1.5}});
    assert_eq!(joined(&server.streamed(TEXT, &body), 0, "text"), text);
    let stop: String = text.chars().skip(4).take(3).collect();
    body["stop"] = json!([stop, "never"]);
    let chunks = server.streamed(TEXT, &body);
    assert_eq!(joined(&chunks, 0, "text"), text.split(&stop).next().unwrap());
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
    // or to a token
    let body = json!({"prompt": "the", "temperature": 0, "stop_token_ids": [70], "logit_bias": {"70": 100}});
    let choice = &server.post(TEXT, &body).1["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(""), &json!("stop")));
    // the second time the beginning is there
    let long = json!({"prompt": "the whale dives ".repeat(40), "max_tokens": 1});
    server.post(TEXT, &long);
    let again = server.post(TEXT, &long).1;
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 64, "{again}");
}

#[test]
fn an_answer_without_thinking_has_no_thought() {
    let server = Server::plain();
    let mut marks = 0;
    for effort in ["none", "low"] {
        let extra = json!({"reasoning_effort": effort, "n": 16, "max_tokens": 200, "seed": 1});
        let (status, whole) = server.post(CHAT, &chat(&extra));
        assert_eq!(status, 200, "{whole}");
        if effort == "none" {
            assert!(
                !whole.to_string().contains("think>") && !whole.to_string().contains("reasoning_content")
            );
        } else {
            marks = whole.to_string().matches("think>").count();
        }
    }
    assert!(marks > 0, "this model writes marks wherever it may");
}

#[test]
fn requests_that_are_over_are_told() {
    let server = Server::plain();
    let body = chat(&json!({"max_tokens": 5, "seed": 1, "n": 2}));
    let usage = server.post(CHAT, &body).1["usage"].clone();
    let told = server.logged(1);
    assert_eq!((told.method.as_str(), told.path.as_str(), told.status), ("POST", CHAT, 200));
    let answered = told.answered.unwrap();
    assert_eq!(answered.prompt, usage["prompt_tokens"].as_u64().unwrap() as usize);
    assert_eq!(answered.written, usage["completion_tokens"].as_u64().unwrap() as usize);
    // a stream is over at its end
    server.streamed(CHAT, &chat(&json!({"max_tokens": 5, "seed": 1, "stream": true})));
    let told = server.logged(2);
    assert_eq!((told.status, told.answered.unwrap().reason), (200, "length"));
    // and where nobody reads it any more
    let long = chat(&json!({"max_tokens": 900, "stream": true, "min_tokens": 900}));
    let mut stream = server.begin(CHAT, &long);
    stream.read_exact(&mut [0; 200]).unwrap();
    drop(stream);
    let told = server.logged(3);
    assert!(told.status == 499 && told.answered.is_none(), "{told:?}");
    assert_eq!(server.post(CHAT, &json!({"wale": 1})).0, server.logged(4).status);
    server.get("/health");
    assert_eq!(server.get("/nothing").0, 404);
    let told = server.logged(6);
    assert_eq!((told.method.as_str(), told.path.as_str(), told.status), ("GET", "/nothing", 404));
}

#[test]
fn only_pages_of_named_origins_may_ask() {
    let server = Server::plain();
    let headers = |head: &str, origin: &str| {
        let mut text = String::new();
        let head = format!(
            "{head}\r\norigin: {origin}\r\naccess-control-request-method: POST\r\n\
                            access-control-request-headers: content-type,x-mine"
        );
        server.send(&head, b"").read_to_string(&mut text).unwrap();
        text.split("\r\n\r\n").next().unwrap().to_ascii_lowercase()
    };
    let (named, ask) = ("http://localhost:3000", format!("OPTIONS {CHAT} HTTP/1.1"));
    let may = headers(&ask, named);
    assert!(may.starts_with("http/1.1 204"), "{may}");
    for header in ["-origin: http://localhost:3000", "-methods: get, post", "-headers: content-type,x-mine"] {
        assert!(may.contains(&format!("access-control-allow{header}")), "{may}");
    }
    assert!(
        headers("GET /health HTTP/1.1", named).contains("access-control-allow-origin: http://localhost:3000")
    );
    for other in ["http://localhost:3001", "http://localhost", "null", "*"] {
        let may_not = headers(&ask, other);
        assert!(may_not.starts_with("http/1.1 403") && !may_not.contains("access-control"), "{may_not}");
        let may_not = headers("GET /health HTTP/1.1", other);
        assert!(may_not.starts_with("http/1.1 403") && !may_not.contains("access-control"), "{may_not}");
    }
    // a page that may not read must not ask either, nor one that calls the server by a name of its own
    let ask = |header: &str| {
        let head = format!("POST {TEXT} HTTP/1.1\r\n{header}\r\ncontent-type: application/json");
        let (status, text) = answer(server.send(&head, br#"{"prompt": "the", "max_tokens": 1}"#));
        (status, serde_json::from_str::<Value>(&text).unwrap()["error"]["message"].clone())
    };
    let ended = server.handle.stats().ended;
    for (header, expected) in [
        (
            "origin: http://shark.example",
            "pages of the origin `http://shark.example` may not ask here, unless the server was started with \
             --allow-origin and that origin",
        ),
        (
            "host: shark.example:8080",
            "who calls this server `shark.example:8080` may not ask here, unless the server was started with \
             --allow-origin and an origin of that host",
        ),
    ] {
        assert_eq!(ask(header), (403, expected.into()));
    }
    assert_eq!(server.handle.stats().ended, ended);
    for host in
        ["localhost:1", "LOCALHOST", "127.0.0.1:8080", "127.0.0.1", "[::1]:8080", "[::1]", "whale.example"]
    {
        assert_eq!(ask(&format!("host: {host}")), (200, Value::Null), "{host}");
    }
    for host in ["10.0.0.1", "[::2]:8080", "localhost.shark.example", "127.0.0.1.shark.example:80", "x", ""] {
        assert_eq!(ask(&format!("host: {host}")).0, 403, "{host}");
    }
}

#[test]
fn what_has_a_form_keeps_it() {
    let server = Server::plain();
    let schema = json!({"type": "object", "properties": {"size": {"enum": ["small", "large"]}, "ok":
        {"type": "boolean"}}, "required": ["size", "ok"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "whale", "schema": schema}});
    for thinks in [true, false] {
        let extra = json!({"response_format": format, "max_tokens": 200, "seed": 1,
            "thinking_budget": if thinks { json!(8) } else { Value::Null },
            "chat_template_kwargs": {"enable_thinking": thinks}});
        let (status, whole) = server.post(CHAT, &chat(&extra));
        assert_eq!(status, 200, "{whole}");
        let message = &whole["choices"][0]["message"];
        let value: Value =
            serde_json::from_str(message["content"].as_str().unwrap()).unwrap_or_else(|error| {
                panic!("{error}: {whole}");
            });
        assert!(value["ok"].is_boolean() && matches!(value["size"].as_str(), Some("small" | "large")));
        assert_eq!(message.get("reasoning_content").is_some(), thinks, "{whole}");
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    }
    let (status, error) = server.post(CHAT, &chat(&json!({"response_format": {"type": "json_schema"}})));
    assert_eq!((status, &error["error"]["param"]), (400, &json!("response_format.json_schema.schema")));
    let bad =
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "whale"}}}});
    assert_eq!(server.post(CHAT, &chat(&bad)).0, 400);
    // other forms, of a text too
    let sizes = ["\"small\"", "la|rge"];
    for (form, expected) in [
        (json!({"regex": "ab{3}"}), &["abbb"][..]),
        (json!({"grammar": "start: \"a\" \"b\"{3}"}), &["abbb"]),
        (json!({"choice": sizes, "regex": null}), &sizes),
        (json!({"json": {"enum": [42]}}), &["42"]),
        (json!({"json": "{\"enum\": [42]}"}), &["42"]),
        (json!({"choice": ["a\u{7f}b\\\n"]}), &["a\u{7f}b\\\n"]),
    ] {
        let text = server.post(TEXT, &json!({"prompt": "the", "structured_outputs": form})).1;
        let said = text["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{text}"));
        assert!(expected.contains(&said), "{form}: {text}");
    }
}

#[test]
fn what_cannot_have_its_form_leaves_other_answers_alone() {
    let server = Server::plain();
    // behind an `a` nothing can come
    let b = tokenizer().id_of("b").unwrap().to_string();
    let body = |n: usize, regex: &str| json!({"prompt": "the", "n": n, "seed": 1, "structured_outputs": {"regex": regex}, "logit_bias": {b.clone(): -100}});
    let (status, whole) = server.post(TEXT, &body(16, "ab|c"));
    assert_eq!(status, 200, "{whole}");
    let said: Vec<(&str, &str)> = (0..16)
        .map(|i| &whole["choices"][i])
        .map(|choice| (choice["text"].as_str().unwrap(), choice["finish_reason"].as_str().unwrap()))
        .collect();
    assert!(said.contains(&("a", "dead_end")) && said.contains(&("c", "stop")), "{said:?}");
    assert!(said.iter().all(|one| [("a", "dead_end"), ("c", "stop")].contains(one)), "{said:?}");
    let mut stream = body(16, "ab|c");
    stream["stream"] = true.into();
    let chunks = server.streamed(TEXT, &stream);
    for (index, (text, _)) in said.iter().enumerate() {
        assert_eq!(joined(&chunks, index, "text"), *text);
    }
    // where none can
    let (status, error) = server.post(TEXT, &body(3, "ab"));
    assert!(status == 400 && error["error"]["message"].as_str().unwrap().contains("cannot go on"), "{error}");
    stream["structured_outputs"] = json!({"regex": "ab"});
    let (_, text) = answer(server.begin(TEXT, &stream));
    assert!(text.contains("cannot go on") && !text.contains("[DONE]"), "{text}");
}

#[test]
fn marks_of_a_form_are_text() {
    let server = Server::plain();
    let form = json!({"structured_outputs": {"regex": "<think>a{3}</think>b"}, "reasoning_effort": "none"});
    let whole = server.post(CHAT, &chat(&form)).1;
    assert_eq!(whole["choices"][0]["message"]["content"], "<think>aaa</think>b", "{whole}");
    assert!(whole["choices"][0]["message"].get("reasoning_content").is_none(), "{whole}");
    // and so is what a request stops at
    let seven = tokenizer().id_of("7").unwrap();
    let body = json!({"prompt": "the", "stop_token_ids": [seven], "structured_outputs": {"regex": "a74"}});
    let choice = &server.post(TEXT, &body).1["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("a"), &json!("stop")));
}

/// A template that leaves it to the model whether to think.
#[test]
fn a_thought_that_the_model_begins_is_free_too() {
    let source = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is false %}<think>\n\n\
                  </think>\n\n{% endif %}";
    let template = ChatTemplate::new("leaves it", source).unwrap();
    let server = Server::of(template, ServiceOptions::default(), Limits::default());
    let open = tokenizer().id_of("<think>").unwrap().to_string();
    let ask = |how: Value, bias: i32| {
        let body = chat(&json!({"structured_outputs": {"regex": "[0-9]{3}"}, "thinking_budget": 5,
            "logit_bias": {open.clone(): bias}, "chat_template_kwargs": how}));
        let whole = server.post(CHAT, &body).1;
        let message = &whole["choices"][0]["message"];
        let said = message["content"].as_str().unwrap_or_else(|| panic!("{whole}"));
        assert!(said.len() == 3 && said.bytes().all(|byte| byte.is_ascii_digit()), "{whole}");
        let spent = &whole["usage"]["completion_tokens_details"]["reasoning_tokens"];
        (message.get("reasoning_content").is_some(), spent.as_u64().unwrap())
    };
    assert_eq!(ask(json!({}), 100), (true, 5));
    assert_eq!(ask(json!({}), -100), (false, 0));
    assert_eq!(ask(json!({"enable_thinking": false}), 100), (false, 0));
}

#[test]
fn thoughts_end_as_the_template_ends_them() {
    let server = Server::plain();
    let ask = |extra: Value| {
        let body = chat(&json!({"max_tokens": 40, "structured_outputs": {"regex": "[0-9]{3}"}}));
        let mut body = body.as_object().unwrap().clone();
        body.extend(extra.as_object().unwrap().clone());
        server.post(CHAT, &body.into()).1
    };
    let none = ask(json!({"thinking_budget": 0}));
    let usage = &none["usage"];
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 0, "{none}");
    // `</think>`, and a token for each digit
    assert_eq!(usage["completion_tokens"], 4, "{none}");
    let some = ask(json!({"thinking_budget": 5}));
    assert_eq!(some["usage"]["completion_tokens_details"]["reasoning_tokens"], 5, "{some}");
    // the parts of a message stand on lines of their own
    let read = |content: Value| {
        let body = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0,
            "logprobs": true});
        let whole = server.post(CHAT, &body).1;
        (whole["usage"]["prompt_tokens"].clone(), whole["choices"][0]["logprobs"].clone())
    };
    let part = |text: &str| json!({"type": "text", "text": text});
    assert_eq!(read(json!([part("the"), part("whale")])), read(json!("the\nwhale")));
}

#[test]
fn who_knows_no_thoughts_is_not_asked_for_one() {
    let source = "{{ enable_thinking }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let template = ChatTemplate::new("plain", source).unwrap();
    let server = Server::of(template, ServiceOptions::default(), Limits::default());
    let read = |extra: Value| server.post(CHAT, &chat(&extra)).1["usage"]["prompt_tokens"].as_u64().unwrap();
    let tokens = |text: &str| tokenizer().encode(text).unwrap().len() as u64;
    for (value, text) in [(json!(true), "truethe whale"), (json!(false), "falsethe whale")] {
        let extra = json!({"chat_template_kwargs": {"enable_thinking": value}});
        assert_eq!(read(extra), tokens(text), "{text}");
    }
    assert_eq!(read(json!({"reasoning_effort": "none"})), read(json!({})));
}

#[test]
fn what_is_wrong_is_told_in_the_form_of_this_api() {
    let server = Server::start(ServiceOptions::default(), Limits { body_bytes: 20_000, ..Limits::default() });
    let said = |(status, error): (u16, Value)| {
        let field = |name: &str| error["error"][name].as_str().unwrap_or("-").to_owned();
        format!("{status} {} {} {}: {}", field("type"), field("param"), field("code"), field("message"))
    };
    let invalid = |rest: &str| format!("400 invalid_request_error {rest}");
    let ask = |extra: Value| said(server.post(CHAT, &chat(&extra)));
    assert_eq!(
        ask(json!({"model": "shark"})),
        "404 invalid_request_error model model_not_found: the model `shark` is not served here; it is `whale`"
    );
    let cases = [
        (json!({"wale": 1}), "wale -: the body has an unknown field `wale`"),
        (json!({"messages": []}), "messages -: `messages`: expected at least one message"),
        (json!({"temperature": -1}), "temperature -: `temperature`: expected a number from 0 to 100, got -1"),
        (json!({"top_p": 0}), "top_p -: `top_p`: expected a share above 0, at most 1, got 0"),
        (json!({"n": 65}), "n -: `n`: expected 1 to 64 answers in all, got 65"),
        (json!({"stop": [1]}), "stop -: `stop`: expected a string or a list of strings"),
        (
            json!({"stop_token_ids": vec![1; 17]}),
            "stop_token_ids -: `stop_token_ids`: expected at most 16 token ids",
        ),
        (
            json!({"stop_token_ids": [999_999]}),
            "stop_token_ids -: `stop_token_ids`: id 999999 is outside the vocabulary of 303 tokens",
        ),
        (
            json!({"structured_outputs": {"regex": "a", "json": {}}}),
            "structured_outputs -: `structured_outputs`: expected one of json, json_object, regex, choice, grammar",
        ),
        (
            json!({"structured_outputs": {"regex": "a", "whitespace": 1}}),
            "structured_outputs -: `structured_outputs`: expected one of json, json_object, regex, choice, grammar, got the \
             unknown field `whitespace`",
        ),
        (
            json!({"structured_outputs": {"json": "{"}}),
            "structured_outputs -: `structured_outputs`: json: expected a schema, got a text that is no JSON: EOF while \
             parsing an object at line 1 column 1",
        ),
        (
            json!({"structured_outputs": {"choice": []}}),
            "structured_outputs -: `structured_outputs`: expected a schema in json, true in json_object, a text in regex and \
             grammar, a list of texts in choice",
        ),
        (
            json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
            "structured_outputs -: `structured_outputs`: is given beside `response_format`; expected one of them",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
                "chat_template_kwargs": {"enable_thinking": false}}),
            "- -: the answer cannot go on: of what its form and `logit_bias` allow nothing can come next; check whether \
             anything has this form",
        ),
        (json!({"stop": [""]}), "stop -: `stop`: expected at most 16 strings of 1 to 4096 bytes"),
        (json!({"top_logprobs": 3}), "top_logprobs -: `top_logprobs`: needs `logprobs` to be true"),
        (
            json!({"logit_bias": {"x": 1}}),
            "logit_bias -: `logit_bias`: expected token ids with numbers from -100 to 100",
        ),
        (
            json!({"tool_choice": "required"}),
            "tool_choice -: `tool_choice`: only auto and none are supported yet",
        ),
        (json!({"prompt": "x"}), "prompt -: `prompt`: is a field of /v1/completions"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0] -: `messages[0]`: content of type `image_url` is not supported yet, only text",
        ),
        (
            json!({"max_tokens": 1020}),
            "messages context_length_exceeded: 1026 tokens do not fit into the context of 1024: 6 of the prompt, 1020 \
             of the answer; shorten the prompt or ask for fewer",
        ),
    ];
    for (extra, expected) in cases {
        assert_eq!(ask(extra), invalid(expected));
    }
    let text = said(server.post(TEXT, &json!({"prompt": [1, 999_999]})));
    assert_eq!(text, invalid("- -: token 1: id 999999 is outside the vocabulary of 303 tokens"));
    let long = said(server.post(TEXT, &json!({"prompt": vec!["x"; 40], "n": 2})));
    assert_eq!(long, invalid("n -: `n`: expected 1 to 64 answers in all, got 80"));
    let echo = said(server.post(TEXT, &json!({"prompt": "x", "echo": true})));
    assert_eq!(echo, invalid("echo -: `echo`: is not supported yet"));

    let raw = |head: &str, body: &[u8]| {
        let (status, text) = answer(server.send(head, body));
        said((status, serde_json::from_str(&text).unwrap()))
    };
    let json_head = "POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json";
    assert!(
        raw(json_head, b"{\"model\": ").starts_with("400 invalid_request_error - -: expected a JSON object")
    );
    assert!(raw(json_head, b"\xff\xfe").starts_with("400 "));
    let deep = "[".repeat(5000);
    assert!(raw(json_head, deep.as_bytes()).starts_with("400 "));
    let large = format!("{{\"user\": \"{}\"}}", "x".repeat(30_000));
    let too_large = raw(json_head, large.as_bytes());
    assert_eq!(too_large, "413 invalid_request_error - -: the body is larger than 20000 bytes");
    let kind = "POST /v1/chat/completions HTTP/1.1\r\ncontent-type: text/plain";
    assert!(raw(kind, b"{}").starts_with("415 "));
    assert!(raw("GET /v1/chat/completions HTTP/1.1", b"").starts_with("405 "));
    assert_eq!(raw("GET /v2 HTTP/1.1", b""), "404 invalid_request_error - -: there is nothing at /v2");
    assert_eq!(server.get("/v1/models").1["data"][0]["id"], "whale");
    assert_eq!(server.get("/v1/models/whale").1["context_length"], CONTEXT);
    assert_eq!(server.get("/v1/models/a/shark").0, 404);
    let health = server.get("/health");
    assert_eq!((health.0, &health.1["status"], &health.1["running"]), (200, &json!("ok"), &json!(0)));
}

#[test]
fn who_goes_away_cancels_and_who_comes_too_late_waits() {
    let options = ServiceOptions { max_running: 1, max_waiting: 1, ..ServiceOptions::default() };
    let server = Server::start(options, Limits::default());
    let long =
        |stream: bool| json!({"prompt": "the", "max_tokens": 1000, "min_tokens": 1000, "stream": stream});
    for stream in [true, false] {
        let ended = server.handle.stats().ended;
        let client = server.begin(TEXT, &long(stream));
        let begin = Instant::now();
        while server.handle.stats().running == 0 {
            assert!(begin.elapsed() < Duration::from_secs(20));
        }
        let before = server.handle.stats().tokens;
        drop(client);
        server.idle();
        let after = server.handle.stats();
        assert_eq!(after.ended, ended + 1);
        assert!(after.tokens - before < 900, "it went on to the end");
    }
    // what can never wait together is not told to come again
    let (status, error) = server.post(TEXT, &json!({"prompt": "the", "n": 2}));
    let expected = "`n`: expected at most 1 answers in all, as many as may wait here, got 2";
    assert_eq!((status, error["error"]["message"].as_str()), (400, Some(expected)));
    // one runs, one waits, one is told to come again
    let (mut clients, begin) = (Vec::new(), Instant::now());
    loop {
        // those before may have ended, or not have arrived
        clients.extend([server.begin(TEXT, &long(true)), server.begin(TEXT, &long(true))]);
        let (status, error) = server.post(TEXT, &json!({"prompt": "the", "max_tokens": 1}));
        if status == 429 {
            assert_eq!(error["error"]["type"], "rate_limit_error");
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
    drop(clients);
    // requests of those that are gone may still arrive: until the last of them is cancelled there may be no room
    let begin = Instant::now();
    loop {
        server.idle();
        match server.post(TEXT, &json!({"prompt": "the", "max_tokens": 1})).0 {
            429 => assert!(begin.elapsed() < Duration::from_secs(20), "there is no room again"),
            status => break assert_eq!(status, 200),
        }
    }
}

#[test]
fn bodies_that_come_together_wait_for_each_other() {
    let limits = Limits { bodies: 1, ..Limits::default() };
    let server = Server::start(ServiceOptions { max_running: 2, ..ServiceOptions::default() }, limits);
    let body = json!({"prompt": "the", "max_tokens": 3});
    // the first is late with its body
    let text = body.to_string();
    let mut late = TcpStream::connect(server.addr).unwrap();
    let head = format!(
        "POST {TEXT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: \
         {}\r\n\r\n",
        text.len()
    );
    late.write_all(head.as_bytes()).unwrap();
    let others: Vec<TcpStream> = (0..20).map(|_| server.begin(TEXT, &body)).collect();
    std::thread::sleep(Duration::from_millis(100));
    late.write_all(text.as_bytes()).unwrap();
    for client in others.into_iter().chain([late]) {
        assert_eq!(answer(client).0, 200);
    }
    // who only announces a body, or stops in the middle, does not keep the place of others
    let limits = Limits { bodies: 1, stall_time: Duration::from_secs(2), ..Limits::default() };
    let server = Server::start(ServiceOptions::default(), limits);
    let mut halves = [0, 1, 1].map(|sent| {
        let mut half = TcpStream::connect(server.addr).unwrap();
        half.write_all(&[head.as_bytes(), &text.as_bytes()[..sent]].concat()).unwrap();
        half
    });
    std::thread::sleep(Duration::from_millis(50));
    let begin = Instant::now();
    assert_eq!(server.post(TEXT, &body).0, 200);
    assert!(begin.elapsed() < Duration::from_secs(20));
    let said = halves.each_mut().map(|half| {
        let mut said = String::new();
        half.read_to_string(&mut said).unwrap();
        said
    });
    assert!(
        said.iter().all(|said| said.contains(" 408 ") && said.contains("nothing of the body came")),
        "{said:?}"
    );
    // a place is waited for as long as a body is
    let limits = Limits { bodies: 0, body_time: Duration::from_millis(50), ..Limits::default() };
    assert_eq!(Server::start(ServiceOptions::default(), limits).post(TEXT, &body).0, 408);
}

#[test]
fn who_says_nothing_gives_way() {
    let limits = Limits { connections: 2, head_time: Duration::from_millis(200), ..Limits::default() };
    let server = Server::start(ServiceOptions::default(), limits);
    let silent: Vec<TcpStream> = (0..6)
        .map(|_| {
            let mut stream = TcpStream::connect(server.addr).unwrap();
            stream.write_all(b"GET /health HTTP/1.1\r\nhost:").unwrap();
            stream
        })
        .collect();
    assert_eq!(server.get("/health").0, 200);
    for mut stream in silent {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(!rest.contains("200 OK"), "{rest}");
    }
}

#[test]
fn who_does_not_read_gives_way() {
    let limits = Limits { connections: 1, stall_time: Duration::from_millis(500), ..Limits::default() };
    let server = Server::start(ServiceOptions::default(), limits);
    // more answers than the system keeps for a client that reads none
    let ask = format!("GET /{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "x".repeat(200)).repeat(1000);
    let mut deaf = TcpStream::connect(server.addr).unwrap();
    deaf.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let error = std::iter::repeat_with(|| deaf.write_all(ask.as_bytes())).find_map(Result::err).unwrap();
    let closed = [std::io::ErrorKind::ConnectionReset, std::io::ErrorKind::BrokenPipe];
    assert!(closed.contains(&error.kind()), "{error}");
    assert_eq!(server.get("/health").0, 200);
}

#[test]
fn who_is_never_taken_up_is_told_to_come_again() {
    let limits = Limits { time: Duration::ZERO, ..Limits::default() };
    let server = Server::start(ServiceOptions::default(), limits);
    let mut text = String::new();
    server.begin(TEXT, &json!({"prompt": "the", "n": 2})).read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 503") && text.contains("\r\nretry-after: 1"), "{text}");
    assert!(text.contains("the server is busy") && text.contains("server_error"), "{text}");
}

#[test]
fn memory_that_is_short_is_not_taken_for_the_context() {
    let page = ServiceOptions::default().cache;
    let drawn = model(300);
    let page = page.page_bytes(&drawn.config, &drawn.precision).unwrap();
    let server = Server::start(
        ServiceOptions { cache_bytes: 4 * page, ..ServiceOptions::default() },
        Limits::default(),
    );
    let (status, error) = server.post(TEXT, &json!({"prompt": vec![7; 250], "max_tokens": 50}));
    let expected = "300 tokens do not fit into the memory for caches, which holds 256 of the 1024 that the model takes: \
                    250 of the prompt, 50 of the answer; shorten the prompt or ask for fewer, or give the server more memory \
                    (--cache-gib)";
    assert_eq!((status, error["error"]["message"].as_str()), (400, Some(expected)));
    assert_eq!(
        (&error["error"]["param"], &error["error"]["code"]),
        (&json!("prompt"), &json!("context_length_exceeded"))
    );
}

#[test]
fn a_server_whose_model_is_gone_ends() {
    let mut server = Server::plain();
    drop(server.service.take());
    let ended = server.thread.take().unwrap().join().unwrap().unwrap_err().to_string();
    assert_eq!(ended, "the thread of the model has ended, and nothing can be answered any more");
}

#[test]
fn who_is_late_gets_what_there_is() {
    let server = Server::start(
        ServiceOptions::default(),
        Limits { time: Duration::from_millis(150), ..Limits::default() },
    );
    let (status, whole) =
        server.post(TEXT, &json!({"prompt": "the", "n": 16, "max_tokens": 1000, "min_tokens": 1000}));
    assert_eq!((status, &whole["choices"][0]["finish_reason"]), (200, &json!("length")));
    assert!(whole["usage"]["completion_tokens"].as_u64().unwrap() < 16_000, "{whole}");
}

#[test]
fn a_server_that_stops_lets_answers_end() {
    let mut server = Server::plain();
    let client = server.begin(TEXT, &json!({"prompt": "the", "max_tokens": 300, "seed": 1, "stream": true}));
    while server.handle.stats().running == 0 {}
    server.stop.store(true, Ordering::Release);
    let (status, text) = answer(client);
    assert!(status == 200 && text.trim_end().ends_with("[DONE]"), "{text}");
    server.thread.take().unwrap().join().unwrap().unwrap();
    assert!(TcpStream::connect(server.addr).is_err());
}
