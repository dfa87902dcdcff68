//! The resolved recipe as TOML: itself a recipe that resolves to the same.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::Value;

use super::{Dtype, Optimizer, Precision, Resolved, Scales, Scaling, model};
use crate::schedule::Decay;

struct Writer<'a> {
    text: String,
    given: &'a BTreeSet<String>,
    section: &'static str,
}

impl Writer<'_> {
    fn open(&mut self, section: &'static str) {
        let gap = if self.text.is_empty() { "" } else { "\n" };
        // writing to a String cannot fail
        let _ = writeln!(self.text, "{gap}[{section}]");
        self.section = section;
    }

    /// `key = value`, marked when the recipe did not say it.
    fn put(&mut self, key: &str, value: impl std::fmt::Display) {
        let given = self.given.contains(&format!("{}.{key}", self.section));
        let mark = if given { "" } else { "  # derived" };
        let _ = writeln!(self.text, "{key} = {value}{mark}");
    }
}

fn string(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn strings(texts: &[String]) -> String {
    format!("[{}]", texts.iter().map(|text| string(text)).collect::<Vec<_>>().join(", "))
}

/// Shortest digits that read back the same, always with a point or an exponent.
fn float(number: f64) -> String {
    format!("{number:?}")
}

/// A JSON value of the config; null has no TOML.
fn inline(value: &Value) -> Option<String> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => string(text),
        Value::Array(values) => {
            format!("[{}]", values.iter().filter_map(inline).collect::<Vec<_>>().join(", "))
        }
        Value::Object(object) => {
            let pairs: Vec<String> = object
                .iter()
                .filter_map(|(key, value)| Some(format!("{key} = {}", inline(value)?)))
                .collect();
            format!("{{ {} }}", pairs.join(", "))
        }
    })
}

/// See [`Resolved::to_toml`].
pub(super) fn recipe(resolved: &Resolved) -> String {
    let mut w = Writer { text: String::new(), given: &resolved.given, section: "" };
    let uniform =
        [Dtype::F32, Dtype::Bf16, Dtype::Fp8].into_iter().find(|d| Precision::all(*d) == resolved.precision);
    if let Some(dtype) = uniform {
        let mark = if resolved.given.contains("precision") { "" } else { "  # derived" };
        let _ = writeln!(w.text, "precision = {}{mark}", string(dtype.name()));
    }
    w.open("run");
    w.put("name", string(&resolved.run.name));
    w.put("seed", resolved.run.seed);
    w.put("out", string(&resolved.run.out));
    if let Some(baseline) = &resolved.baseline {
        w.put("baseline", string(baseline));
    }
    write_model(&mut w, resolved);
    write_data(&mut w, resolved);
    write_train(&mut w, resolved);
    if uniform.is_none() {
        w.open("precision");
        for (role, dtype) in resolved.precision.roles() {
            w.put(role, string(dtype.name()));
        }
        let scaling = match resolved.precision.scaling {
            Scaling::Block => "block",
            Scaling::Tensor => "tensor",
        };
        let scales = match resolved.precision.scales {
            Scales::F32 => "f32",
            Scales::Ue8m0 => "ue8m0",
        };
        w.put("scaling", string(scaling));
        w.put("scales", string(scales));
    }
    w.open("sample");
    w.put("prompts", strings(&resolved.sample.prompts));
    w.put("tokens", resolved.sample.tokens);
    w.put("temperature", float(resolved.sample.temperature));
    w.text
}

fn write_model(w: &mut Writer, resolved: &Resolved) {
    let config = resolved.config.to_json();
    w.open("model");
    w.put("family", string(resolved.config.family.model_type()));
    w.put("depth", resolved.depth);
    for field in model::fields(resolved.config.family) {
        match inline(&config[field]) {
            Some(value) => w.put(field, value),
            None if field == "q_lora_rank" => w.put(field, 0),
            None => {}
        }
    }
}

fn write_data(w: &mut Writer, resolved: &Resolved) {
    let data = &resolved.data;
    w.open("data");
    w.put("random", data.random);
    w.put("validation_share", float(data.validation_share));
    w.put("document_borders", data.document_borders);
    w.put("packing", string(data.packing.name()));
    if let Some(tokenizer) = &data.tokenizer {
        w.put("tokenizer", string(tokenizer));
    }
    if let Some(vocab_size) = data.vocab_size {
        w.put("vocab_size", vocab_size);
    }
    if let Some(max_bytes) = data.max_bytes {
        w.put("max_bytes", max_bytes);
    }
    for source in &data.sources {
        let _ = write!(w.text, "\n[[data.sources]]\npath = {}\n", string(&source.path));
        let _ = writeln!(w.text, "include = {}", strings(&source.include));
        let _ = writeln!(w.text, "exclude = {}", strings(&source.exclude));
        if let Some(max_bytes) = source.max_bytes {
            let _ = writeln!(w.text, "max_bytes = {max_bytes}");
        }
    }
}

fn write_train(w: &mut Writer, resolved: &Resolved) {
    let train = &resolved.train;
    let optim = &train.optim;
    let optimizer = match optim.optimizer {
        Optimizer::AdamW => "adamw",
        Optimizer::Muon => "muon",
    };
    let decay = match optim.decay {
        Decay::Linear => "linear",
        Decay::OneMinusSqrt => "one_minus_sqrt",
    };
    w.open("train");
    w.put("sequence_length", train.sequence_length);
    w.put("batch_size", train.batch_size);
    w.put("accumulation", train.accumulation);
    w.put("tokens", train.tokens);
    w.put("optimizer", string(optimizer));
    w.put("lr", float(optim.lr));
    w.put("muon_lr", float(optim.muon_lr));
    w.put("muon_momentum", float(optim.muon_momentum));
    w.put("betas", format!("[{}, {}]", float(optim.betas[0]), float(optim.betas[1])));
    w.put("moments", string(optim.moments.name()));
    w.put("eps", float(optim.eps));
    w.put("weight_decay", float(optim.weight_decay));
    w.put("warmup_share", float(optim.warmup_share));
    w.put("decay_share", float(optim.decay_share));
    w.put("decay", string(decay));
    w.put("final_lr_share", float(optim.final_lr_share));
    w.put("clip", float(optim.clip));
    w.put("mtp_loss_weight", float(optim.mtp_loss_weight));
    w.put("bias_update_speed", float(optim.bias_update_speed));
    w.put("sequence_balance_alpha", float(optim.sequence_balance_alpha));
    w.put("recompute", string(optim.recompute.name()));
    w.put("eval_every", train.eval_every);
    w.put("eval_tokens", train.eval_tokens);
    w.put("sample_every", train.sample_every);
    w.put("checkpoint_every", train.checkpoint_every);
    w.put("keep", train.keep);
}
