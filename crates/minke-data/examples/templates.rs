//! Compares chat templates of a folder with what transformers renders of them.
//!
//! ```text
//! python scripts/template_vectors.py FOLDER --all --out FILE
//! cargo run --release --example templates -p minke-data -- FILE FOLDER
//! ```

use std::path::Path;
use std::process::ExitCode;

use minke_data::ChatTemplate;
use serde_json::{Map, Value};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, folder] = &args[..] else {
        eprintln!("usage: templates FILE FOLDER");
        return ExitCode::from(2);
    };
    let vectors: Value =
        serde_json::from_slice(&std::fs::read(file).expect("FILE is readable")).expect("FILE is JSON");
    let (mut same, mut other) = (0, 0);
    for entry in vectors["templates"].as_array().into_iter().flatten() {
        let name = entry["name"].as_str().unwrap_or_default();
        let path = Path::new(folder).join(format!("{name}.jinja"));
        let source = std::fs::read_to_string(&path).expect("FOLDER holds the templates of FILE");
        let template = match ChatTemplate::new(name, &source) {
            Ok(template) => template.with_names(&entry["tokens"]),
            Err(error) => {
                println!("{name}: {error}");
                other += 1;
                continue;
            }
        };
        for (case, options) in vectors["cases"].as_object().into_iter().flatten() {
            let told = &entry["told"][case];
            let mut variables: Map<String, Value> = options.as_object().cloned().unwrap_or_default();
            let messages = variables.remove("messages").unwrap_or_default();
            let tools = variables.remove("tools").unwrap_or_default();
            variables.extend(variables.get("extra").and_then(Value::as_object).cloned().unwrap_or_default());
            let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
            let got = template.render_values(&list(&messages), &list(&tools), &variables);
            match (&got, told[2].as_str()) {
                (Ok(got), Some(told)) if got == told => same += 1,
                (Err(_), None) => same += 1,
                _ => {
                    other += 1;
                    println!("--- {name}, {case}\ntold {told}\ngot  {got:?}");
                }
            }
        }
    }
    println!("{same} the same, {other} not");
    if other == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
