//! Verifiers on right, wrong, equivalent and hostile answers.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::{Asked, Verifier};
use crate::Verdict;

#[expect(clippy::needless_pass_by_value, reason = "calls read better")]
fn read(name: &str, answer: Value, options: Value, folder: &Path) -> Result<Verifier, String> {
    let Value::Object(options) = options else { panic!("options are an object") };
    let answer = Some(&answer).filter(|answer| !answer.is_null());
    let asked = Asked { name: Some(name), options, answer, folder };
    Verifier::read(asked).map_err(|error| error.to_string())
}

fn verifier(name: &str, answer: impl Into<Value>, options: Value) -> Verifier {
    read(name, answer.into(), options, Path::new("")).unwrap()
}

fn refused(name: &str, answer: impl Into<Value>, options: Value) -> String {
    read(name, answer.into(), options, Path::new("")).unwrap_err()
}

#[track_caller]
fn check(verifier: &Verifier, right: &[&str], wrong: &[&str]) {
    for answer in right {
        assert_eq!(verifier.verify("", answer), Verdict::Right, "{answer:?}");
    }
    for answer in wrong {
        assert_eq!(verifier.verify("", answer), Verdict::Wrong, "{answer:?}");
    }
}

#[test]
fn exact() {
    check(&verifier("exact", "Paris", json!({})), &["Paris", " Paris\n"], &["paris", "Paris.", "", "Par is"]);
    check(&verifier("exact", "Straße", json!({"ignore_case": true})), &["STRAßE", "straße"], &["strasse"]);
    assert!(refused("exact", Value::Null, json!({})).contains("needs an `answer`"));
    assert!(refused("exact", "a", json!({"ignore_case": 1})).contains("expected true or false, got 1"));
    // far too long to be an answer
    check(&verifier("exact", "a", json!({})), &[], &[&"a".repeat(2 << 20)]);
}

#[test]
fn number() {
    let half = verifier("number", "1/2", json!({}));
    check(
        &half,
        &["0.5", "2/4", "50%", " .5 ", "5e-1", "0.05E1", "\\frac{1}{2}", "$\\dfrac{1}{2}$", "$0.5$", "0.5."],
        &["0.50001", "1/2 km", "5", "", "-1/2", "1/0", "5e-1e0", "\\frac{1}{0}", "1/2e0", "half", "0.5 0.5"],
    );
    assert_eq!(half.canonical("50%"), half.canonical("0.5"));
    assert_ne!(half.canonical("0.5"), half.canonical("0.51"));
    check(&verifier("number", 3.25, json!({"tolerance": 0.25})), &["3", "3.5", "13/4"], &["2.99", "3.51"]);
    check(
        &verifier("number", "200", json!({"relative": 0.01})),
        &["198", "202"],
        &["197.9", "202.1", "-200"],
    );
    check(
        &verifier("number", "5 km", json!({"units": ["m", "km", "€"]})),
        &["5", "5km", "5.0 km", "€5", "5 m."],
        &["5 mi", "5 kmm", "km", "5 5"],
    );
    // arithmetic on hostile numbers stays cheap
    let start = Instant::now();
    check(&half, &[], &["1e999999999", "1e400", &"9".repeat(100_000), "1e-2147483648", "0e99999999999"]);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert!(refused("number", "five", json!({})).contains("expected a number"));
    assert!(
        refused("number", "5", json!({"tolerance": -1})).contains("`tolerance`: expected a number from 0")
    );
    assert!(refused("number", "5", json!({"units": [""]})).contains("a unit is empty"));
    let plain = Asked { name: None, options: Map::new(), answer: Some(&json!("1/2")), folder: Path::new("") };
    check(&Verifier::read(plain).unwrap(), &["0.5"], &["2"]);
}

#[test]
fn choice() {
    let cities = verifier("choice", "B", json!({"choices": ["Paris", "London", "The Hague"]}));
    check(
        &cities,
        &["B", "b", "(B)", "B.", "b)", "**B**", "London", "london.", "B. London", "(b) london", "Option B"],
        &["A", "Paris", "A. London", "B. Paris", "A or B", "B C", "", "Londo", "D", "BB", "not B"],
    );
    assert_eq!(cities.canonical("london"), cities.canonical("(B)"));
    check(&verifier("choice", "the hague", json!({"choices": ["Paris", "The Hague"]})), &["B"], &["A"]);
    check(&verifier("choice", "D", json!({})), &["d", "D. something"], &["E", "E. D"]);
    check(&verifier("choice", "x", json!({"choices": {"X": "one", "Y": "two"}})), &["one", "X"], &["two"]);
    for (answer, choices) in [
        (json!("E"), json!(["a1", "b1"])),
        (json!("A"), json!(["same", "Same"])),
        (json!("A"), json!(["one"])),
        (json!("A"), json!(5)),
        (json!("A"), json!({"AB": "x", "C": "y"})),
    ] {
        refused("choice", answer, json!({"choices": choices}));
    }
}

#[test]
fn regex() {
    check(&verifier("regex", "a+b", json!({})), &["aab", " ab "], &["xab", "abx", "b"]);
    check(&verifier("regex", Value::Null, json!({"pattern": "a|bc", "search": true})), &["xbc"], &["b"]);
    check(&verifier("regex", "a|bc", json!({"ignore_case": true})), &["A", "BC"], &["ac", "abc"]);
    // what takes backtracking engines for ever
    let start = Instant::now();
    check(&verifier("regex", "(a*)*b", json!({})), &[], &[&"a".repeat(100_000)]);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(refused("regex", "(", json!({})).starts_with("`pattern`: "));
    assert!(refused("regex", "a)|(b", json!({})).starts_with("`pattern`: "));
    assert!(refused("regex", "(a{1000}){1000}", json!({})).contains("size limit"));
    assert!(refused("regex", "a".repeat(5000), json!({})).contains("at most 4096 bytes"));
    assert!(refused("regex", Value::Null, json!({})).contains("needs a `pattern`"));
}

#[test]
fn json_answers() {
    let schema = json!({
        "type": "object", "required": ["age"],
        "properties": {"age": {"type": "integer", "minimum": 0}, "name": {"type": "string", "pattern": "^[a-z]+$"}},
    });
    let fits = verifier("json", Value::Null, json!({ "schema": schema }));
    check(
        &fits,
        &["{\"age\": 3}", "```json\n{\"age\": 3, \"name\": \"ann\"}\n```"],
        &[
            "{\"age\": -1}",
            "{}",
            "[]",
            "age",
            "",
            "{\"age\": 3, \"name\": \"A\"}",
            "{\"age\": 3} x",
            &"[".repeat(100_000),
        ],
    );
    let equal = verifier("json", json!({"a": [1, 2], "b": null}), json!({}));
    check(&equal, &["{\"b\": null, \"a\": [1.0, 2]}"], &["{\"a\": [2, 1], \"b\": null}", "{\"a\": [1, 2]}"]);
    assert_eq!(equal.canonical("{\"a\": 1, \"b\": 2}"), equal.canonical("{ \"b\":2,\"a\":1 }"));
    check(&verifier("json", "[1]", json!({"schema": {"type": "array"}})), &["[1]"], &["[2]"]);
    // a list is reached through itself, which ends with the answer
    let tree = json!({"type": "array", "items": {"$ref": "#"}});
    check(&verifier("json", Value::Null, json!({ "schema": tree })), &["[[], [[]]]"], &["[[1]]"]);
    for schema in [
        json!(5),
        json!({"type": "nonsense"}),
        json!({"$ref": "https://example.com/schema.json"}),
        json!({"$ref": "file:///etc/passwd"}),
        json!({"$ref": "#"}),
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}}),
        json!({"$anchor": "a", "$ref": "#a"}),
        json!({"$defs": {"a": {"$id": "b", "$ref": "#"}}, "$ref": "#/$defs/a"}),
        json!({"$ref": "#/%24defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        json!({"pattern": "("}),
    ] {
        assert!(
            refused("json", Value::Null, json!({"schema": schema.clone()})).starts_with("`schema`: "),
            "{schema}"
        );
    }
    assert!(refused("json", Value::Null, json!({})).contains("needs a `schema`"));
    assert!(refused("json", "not json", json!({})).contains("expected JSON"));
}

/// A folder with an executable script in it.
fn script(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("check.sh");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

/// Runs a script as a verifier.
fn run(text: &str, options: Value, prompt: &str, expected: &str, answer: &str) -> Verdict {
    let folder = script(text);
    let mut options = options;
    options["command"] = json!(["./check.sh", "{prompt}", "{expected}"]);
    read("program", json!(expected), options, folder.path()).unwrap().verify(prompt, answer)
}

#[track_caller]
fn error(verdict: Verdict) -> String {
    match verdict {
        Verdict::Error(reason) => reason,
        other => panic!("expected an error, got {other:?}"),
    }
}

#[test]
fn a_program_gets_answer_prompt_and_expected() {
    let compare = "[ \"$1\" = \"a 'q'; $(x)\" ] && [ \"$MINKE_PROMPT\" = \"$1\" ] && [ \"$MINKE_EXPECTED\" = \"$2\" ] \
                   || exit 7\n[ \"$(cat)\" = \"$2\" ] || exit 1";
    // the prompt is never a shell's to read
    let compare = compare.replace("\"a 'q'; $(x)\"", "\"a 'q'; \\$(x)\"");
    assert_eq!(run(&compare, json!({}), "a 'q'; $(x)", "42", "42"), Verdict::Right);
    assert_eq!(run(&compare, json!({}), "a 'q'; $(x)", "42", "43"), Verdict::Wrong);
    assert_eq!(run("exit 0", json!({}), "", "", &"x".repeat(1 << 20)), Verdict::Right, "it need not read");
    assert_eq!(run("[ $(wc -c) = 1048576 ]", json!({}), "", "", &"x".repeat(1 << 20)), Verdict::Right);
    assert_eq!(
        run("[ -z \"$CARGO_MANIFEST_DIR\" ]", json!({}), "", "", ""),
        Verdict::Right,
        "a bare environment"
    );
}

#[test]
fn a_program_that_fails_is_an_error() {
    let said = error(run("echo something broke >&2; exit 3", json!({}), "", "", ""));
    assert!(
        said.ends_with("ended with status 3; expected 0 for right or 1 for wrong: something broke"),
        "{said}"
    );
    assert!(error(run("kill -SEGV $$", json!({}), "", "", "")).contains("ended by signal 11"));
    assert!(error(run("exit 0", json!({}), "nul\0", "", "")).contains("cannot run"));
    assert!(error(run("exit 0", json!({}), &"x".repeat(1 << 20), "", "")).contains("cannot run"));
}

#[test]
fn a_program_that_is_missing_is_said_before_anything_runs() {
    let refused = |command: Value| refused("program", "a", json!({"command": command}));
    assert!(refused(json!("no-such-program-here")).contains("is not a program on the PATH"));
    assert!(refused(json!(["./no-such-file"])).contains("is not there"));
    assert!(refused(json!([])).contains("expected a program"));
    assert!(refused(json!("")).contains("is no name of a program"));
    let folder = script("exit 0");
    fs::set_permissions(folder.path().join("check.sh"), fs::Permissions::from_mode(0o644)).unwrap();
    let error = read("program", json!("a"), json!({"command": "./check.sh"}), folder.path()).unwrap_err();
    assert!(error.contains("is not executable"), "{error}");
    assert!(read("program", json!("a"), json!({"command": "true", "timeout_s": 0}), folder.path()).is_err());
    assert_eq!(verifier("program", "a", json!({"command": "true"})).verify("", ""), Verdict::Right);
}

#[test]
fn a_program_that_sleeps_is_ended() {
    let start = Instant::now();
    let said = error(run("sleep 1000", json!({"timeout_s": 0.3}), "", "", ""));
    assert!(said.contains("did not end within 0.3 s"), "{said}");
    // and one that will not take a hint, and one that never reads
    error(run("trap '' TERM INT HUP; while :; do sleep 1; done", json!({"timeout_s": 0.3}), "", "", ""));
    error(run("sleep 1000", json!({"timeout_s": 0.3}), "", "", &"x".repeat(1 << 20)));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_program_that_computes_for_ever_runs_out_of_processor_time() {
    let said = error(run("while :; do :; done", json!({"timeout_s": 30, "cpu_s": 1}), "", "", ""));
    assert!(said.contains("used more than 1 s of processor time"), "{said}");
}

#[test]
fn what_a_program_forks_does_not_outlive_it() {
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pids");
    let forks = |then: &str| {
        let path = pids.display();
        // children that hold the pipes, ignore hints, and have children of their own
        format!(
            "for i in 1 2 3; do (trap '' TERM HUP; sleep 1000 & echo $! >> {path}; sleep 1000) & echo $! >> {path}; done; sleep 0.2; {then}"
        )
    };
    let start = Instant::now();
    assert_eq!(run(&forks("exit 0"), json!({}), "", "", "x"), Verdict::Right);
    error(run(&forks("sleep 1000"), json!({"timeout_s": 0.6}), "", "", ""));
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    let alive = |pid: &str| {
        // one that nobody has waited for yet is dead all the same
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    };
    let pids = fs::read_to_string(&pids).unwrap();
    assert_eq!(pids.lines().count(), 12, "{pids}");
    let deadline = Instant::now() + Duration::from_secs(5);
    while pids.lines().any(alive) {
        assert!(Instant::now() < deadline, "some of {pids:?} live on");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_program_that_prints_for_ever_fills_nothing() {
    let start = Instant::now();
    error(run("yes", json!({"timeout_s": 0.5}), "", "", ""));
    let said = error(run("yes something >&2", json!({"timeout_s": 20}), "", "", ""));
    assert!(said.contains("wrote more than 16777216 bytes of errors: something"), "{said}");
    assert!(said.len() < 1000, "{} bytes", said.len());
    // much output and a verdict after all
    assert_eq!(run("head -c 100000000 /dev/zero; exit 1", json!({}), "", "", ""), Verdict::Wrong);
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_program_that_takes_memory_or_disk_is_stopped() {
    // a shell that doubles a text
    let grow = "x=aaaaaaaaaaaaaaaa; while :; do x=\"$x$x\"; done";
    error(run(grow, json!({"memory_mib": 64, "timeout_s": 20}), "", "", ""));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("big");
    let said = error(run(
        &format!("exec dd if=/dev/zero of={} bs=1M count=1000", path.display()),
        json!({}),
        "",
        "",
        "",
    ));
    assert!(said.contains("signal 25"), "{said}");
    assert!(fs::metadata(&path).unwrap().len() <= 128 << 20);
}
