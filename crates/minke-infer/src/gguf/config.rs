//! A `config.json` from the keys of a file.

use minke_data::gguf::{GgufFile, tokenizer};
use minke_data::{Error, Result};
use serde_json::{Map, Value, json};

use super::names::Arch;

/// Keys that would change a model and that no folder of these families has, with what changes nothing.
const REFUSED: [(&str, f64); 8] = [
    ("attention.scale", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.temperature_scale", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
    ("expert_group_scale", 1.0),
];

/// Keys of one architecture.
struct Keys<'a> {
    file: &'a GgufFile,
    arch: Arch,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch.name())
    }

    fn wrong(&self, name: &str, expected: impl Into<String>, got: impl Into<String>) -> Error {
        self.file.wrong(format!("key `{}`", self.key(name)), expected, got)
    }

    /// A whole number; an array of them counts where all are the same.
    fn uint(&self, name: &str) -> Result<Option<u64>> {
        let key = self.key(name);
        if self.file.value(&key).is_some_and(|value| value.len().is_some()) {
            let all = self.file.ints(&key)?.unwrap_or_default();
            let first = all.first().copied().unwrap_or(-1);
            return match u64::try_from(first) {
                Ok(one) if all.iter().all(|x| *x == first) => Ok(Some(one)),
                _ => Err(self.wrong(name, "the same for all layers", "different ones")),
            };
        }
        self.file.uint(&key)
    }

    fn need(&self, name: &str) -> Result<u64> {
        self.uint(name)?.ok_or_else(|| self.wrong(name, "a whole number", "no such key"))
    }

    fn float(&self, name: &str) -> Result<Option<f64>> {
        match self.file.float(&self.key(name))? {
            Some(x) if !x.is_finite() => Err(self.wrong(name, "a finite number", x.to_string())),
            found => Ok(found),
        }
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        self.file.text(&self.key(name))
    }

    fn has(&self, tensor: &str) -> bool {
        self.file.tensor(tensor).is_some()
    }
}

/// What a file's `general.architecture` is.
///
/// # Errors
/// It is missing, or none that is read.
pub(super) fn arch(file: &GgufFile) -> Result<Arch> {
    let known = Arch::ALL.map(Arch::name).join(", ");
    let place = "key `general.architecture`";
    let Some(name) = file.text("general.architecture")? else {
        return Err(file.wrong(place, format!("one of {known}"), "no such key"));
    };
    Arch::from_name(&name)
        .ok_or_else(|| file.wrong(place, format!("one of {known}"), format!("\"{}\"", name.escape_debug())))
}

/// The `config.json` that says what a file's keys say, in the field names of transformers; and the file's architecture.
///
/// # Errors
/// Keys that are missing, of another type than they should be, or that no config of the family can say.
pub fn config_json(file: &GgufFile) -> Result<(Value, Arch)> {
    let arch = arch(file)?;
    let keys = Keys { file, arch };
    for (name, neutral) in REFUSED {
        if let Some(found) = keys.float(name)?.filter(|x| *x != neutral) {
            return Err(keys.wrong(
                name,
                format!("{neutral} or no such key"),
                format!("{found}, which is not built"),
            ));
        }
    }
    if file.flag(&keys.key("attention.causal"))? == Some(false) {
        return Err(keys.wrong("attention.causal", "true", "false; only causal attention is built"));
    }
    let embedding = file.tensor("token_embd.weight");
    let Some([rows, _]) = embedding.map(|tensor| tensor.shape) else {
        return Err(file.wrong("tensor `token_embd.weight`", "a matrix", "no such tensor"));
    };
    let heads = keys.need("attention.head_count")?;
    let width = keys.need("embedding_length")?;
    let context = keys.need("context_length")?;
    let mut config = Map::new();
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("model_type", json!(model_type(&keys)?));
    put("vocab_size", json!(rows));
    put("hidden_size", json!(width));
    put("intermediate_size", json!(keys.need("feed_forward_length")?));
    put("num_attention_heads", json!(heads));
    put("max_position_embeddings", json!(context));
    let eps = keys.float("attention.layer_norm_rms_epsilon")?;
    put(
        "rms_norm_eps",
        json!(
            eps.ok_or_else(|| { keys.wrong("attention.layer_norm_rms_epsilon", "a number", "no such key") })?
        ),
    );
    put("tie_word_embeddings", json!(!keys.has("output.weight")));
    let ends = tokenizer::ends(file)?;
    put("bos_token_id", json!(ends.bos));
    put("eos_token_id", json!(tokenizer::end_ids(file)?));
    if let Some(pad) = file.uint("tokenizer.ggml.padding_token_id")?.filter(|id| *id < *rows as u64) {
        put("pad_token_id", json!(pad));
    }
    let modules = keys.uint("nextn_predict_layers")?.unwrap_or(0);
    let blocks = keys.need("block_count")?;
    let layers = blocks.checked_sub(modules).filter(|layers| *layers > 0);
    let layers = layers
        .ok_or_else(|| keys.wrong("nextn_predict_layers", "fewer than all blocks", modules.to_string()))?;
    if layers > minke_model::config::MAX_LAYERS as u64 {
        return Err(keys.wrong(
            "block_count",
            format!("at most {}", minke_model::config::MAX_LAYERS),
            layers.to_string(),
        ));
    }
    put("num_hidden_layers", json!(layers));
    match arch {
        Arch::Deepseek2 => latent(&keys, &mut config, heads, modules)?,
        Arch::Llama | Arch::Qwen2 | Arch::Qwen3 | Arch::Qwen3Moe | Arch::Gemma2 | Arch::Gemma3 => {
            grouped(&keys, &mut config, heads, width)?;
        }
    }
    let rope = rope(&keys, context)?;
    match arch {
        Arch::Gemma2 | Arch::Gemma3 => gemma(&keys, &mut config, rope, layers, width, heads)?,
        Arch::Llama | Arch::Qwen2 | Arch::Qwen3 | Arch::Qwen3Moe | Arch::Deepseek2 => {
            config.insert("hidden_act".to_owned(), json!("silu"));
            config.insert("rope_theta".to_owned(), rope["rope_theta"].clone());
            config.insert("rope_parameters".to_owned(), rope);
        }
    }
    Ok((Value::Object(config), arch))
}

fn model_type(keys: &Keys) -> Result<&'static str> {
    Ok(match keys.arch {
        Arch::Llama => "llama",
        Arch::Qwen2 => "qwen2",
        Arch::Qwen3 => "qwen3",
        Arch::Qwen3Moe => "qwen3_moe",
        Arch::Gemma2 => "gemma2",
        Arch::Gemma3 => "gemma3_text",
        // older files, of V2 alone, do not say
        Arch::Deepseek2 => match keys.uint("expert_gating_func")?.unwrap_or(1) {
            0 | 1 => "deepseek_v2",
            2 => "deepseek_v3",
            other => {
                let expected = "1 (softmax) or 2 (sigmoid)";
                return Err(keys.wrong("expert_gating_func", expected, other.to_string()));
            }
        },
    })
}

fn grouped(keys: &Keys, config: &mut Map<String, Value>, heads: u64, width: u64) -> Result<()> {
    let kv_heads = keys.uint("attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = match keys.uint("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => width / heads.max(1),
    };
    let value_dim = keys.uint("attention.value_length")?.unwrap_or(head_dim);
    if value_dim != head_dim {
        return Err(keys.wrong(
            "attention.value_length",
            format!("that of keys, {head_dim}"),
            value_dim.to_string(),
        ));
    }
    let rotated = keys.uint("rope.dimension_count")?.unwrap_or(head_dim);
    if rotated != head_dim {
        return Err(keys.wrong(
            "rope.dimension_count",
            format!("whole heads, {head_dim}"),
            rotated.to_string(),
        ));
    }
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("num_key_value_heads", json!(kv_heads));
    put("head_dim", json!(head_dim));
    put("attention_bias", json!(keys.has("blk.0.attn_q.bias")));
    if keys.has("blk.0.ffn_gate.bias") {
        put("mlp_bias", json!(true));
    }
    let experts = keys.uint("expert_count")?.unwrap_or(0);
    match (keys.arch, experts) {
        (Arch::Qwen3Moe, 1..) => {
            put("num_experts", json!(experts));
            put("num_experts_per_tok", json!(keys.need("expert_used_count")?));
            put("moe_intermediate_size", json!(keys.need("expert_feed_forward_length")?));
            // llama.cpp divides by the sum in this architecture, whatever a file says
            put("norm_topk_prob", json!(true));
            put("decoder_sparse_step", json!(1));
            put("mlp_only_layers", json!([]));
        }
        (Arch::Qwen3Moe, 0) => return Err(keys.wrong("expert_count", "at least 1", "none")),
        (_, 0) => {}
        _ => return Err(keys.wrong("expert_count", "none in this architecture", experts.to_string())),
    }
    Ok(())
}

fn latent(keys: &Keys, config: &mut Map<String, Value>, heads: u64, modules: u64) -> Result<()> {
    let rotated = keys.need("rope.dimension_count")?;
    // older files have whole heads where newer ones have the latent
    let mla = keys.uint("attention.key_length_mla")?;
    let (key, value) = match mla {
        Some(key) => (key, keys.need("attention.value_length_mla")?),
        None => (keys.need("attention.key_length")?, keys.need("attention.value_length")?),
    };
    let plain = key.checked_sub(rotated).filter(|plain| *plain > 0);
    let plain = plain.ok_or_else(|| {
        keys.wrong("rope.dimension_count", format!("less than the {key} of a key"), rotated.to_string())
    })?;
    let v3 = config.get("model_type") == Some(&json!("deepseek_v3"));
    let groups = keys.uint("expert_group_count")?.unwrap_or(1).max(1);
    let used = keys.uint("expert_group_used_count")?.unwrap_or(1).max(1);
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("num_key_value_heads", json!(heads));
    put(
        "q_lora_rank",
        json!(keys.uint("attention.q_lora_rank")?.filter(|_| keys.has("blk.0.attn_q_a.weight"))),
    );
    put("kv_lora_rank", json!(keys.need("attention.kv_lora_rank")?));
    put("qk_nope_head_dim", json!(plain));
    put("qk_rope_head_dim", json!(rotated));
    put("v_head_dim", json!(value));
    put("attention_bias", json!(false));
    put("first_k_dense_replace", json!(keys.uint("leading_dense_block_count")?.unwrap_or(0)));
    put("moe_layer_freq", json!(1));
    put("n_routed_experts", json!(keys.need("expert_count")?));
    put("num_experts_per_tok", json!(keys.need("expert_used_count")?));
    put("n_shared_experts", json!(keys.uint("expert_shared_count")?.unwrap_or(0)));
    put("moe_intermediate_size", json!(keys.need("expert_feed_forward_length")?));
    put("n_group", json!(groups));
    put("topk_group", json!(used));
    put(
        "routed_scaling_factor",
        json!(keys.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0)),
    );
    put("norm_topk_prob", json!(keys.file.flag(&keys.key("expert_weights_norm"))?.unwrap_or(false)));
    if v3 {
        put("scoring_func", json!("sigmoid"));
        put("topk_method", json!("noaux_tc"));
        put("num_nextn_predict_layers", json!(modules));
    } else {
        put("scoring_func", json!("softmax"));
        put("topk_method", json!(if groups > 1 { "group_limited_greedy" } else { "greedy" }));
    }
    Ok(())
}

/// `rope_parameters` of the rope that all layers have, or those that do not slide.
fn rope(keys: &Keys, context: u64) -> Result<Value> {
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);
    let kind = keys.text("rope.scaling.type")?;
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    let factor = factor.filter(|factor| *factor != 0.0 && *factor != 1.0);
    if let Some(scaling) = llama3(keys, theta)? {
        return Ok(scaling);
    }
    match (kind.as_deref(), factor) {
        (None | Some("linear" | "yarn"), None) | (Some("none"), _) => {
            Ok(json!({"rope_type": "default", "rope_theta": theta}))
        }
        (None | Some("linear"), Some(factor)) => {
            Ok(json!({"rope_type": "linear", "rope_theta": theta, "factor": factor}))
        }
        (Some("yarn"), Some(factor)) => yarn(keys, theta, factor, context),
        (Some(other), _) => {
            let got = format!("\"{}\", which is not built", other.escape_debug());
            Err(keys.wrong("rope.scaling.type", "none, linear or yarn", got))
        }
    }
}

fn yarn(keys: &Keys, theta: f64, factor: f64, context: u64) -> Result<Value> {
    let mut scaling = json!({
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings":
            keys.uint("rope.scaling.original_context_length")?.unwrap_or(context),
        "beta_fast": keys.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        "beta_slow": keys.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
    });
    if let Some(weight) = keys.float("rope.scaling.yarn_ext_factor")?.filter(|x| *x != 1.0) {
        return Err(keys.wrong("rope.scaling.yarn_ext_factor", "1 or no such key", weight.to_string()));
    }
    if keys.arch == Arch::Deepseek2 {
        // llama.cpp's converter multiplies by a tenth, and has no place for `mscale`, which is the same in all models
        if let Some(weight) = keys.float("rope.scaling.yarn_log_multiplier")?.filter(|x| *x != 0.0) {
            let weight = short(weight * 10.0);
            scaling["mscale"] = json!(weight);
            scaling["mscale_all_dim"] = json!(weight);
        }
        return Ok(scaling);
    }
    let own = keys.float("rope.scaling.yarn_attn_factor")?;
    let times = keys.float("rope.scaling.attn_factor")?.filter(|x| *x != 1.0);
    if let Some(scale) = own.or(times.map(|times| times * (0.1 * factor.ln() + 1.0))) {
        scaling["attention_factor"] = json!(scale);
    }
    Ok(scaling)
}

/// Six digits of a number: 0.707 again, and not what arithmetic in f32 left of it.
fn short(x: f64) -> f64 {
    format!("{x:.5e}").parse().unwrap_or(x)
}

/// Llama 3's scaling, whose divisors of frequencies a file has as a tensor: the published settings that give them.
fn llama3(keys: &Keys, theta: f64) -> Result<Option<Value>> {
    const NAME: &str = "rope_freqs.weight";
    let Some(tensor) = keys.file.tensor(NAME) else { return Ok(None) };
    let mut divisors = vec![0.0; tensor.shape.iter().product()];
    super::source::decode(tensor.kind, tensor.bytes, &mut divisors);
    if divisors.iter().all(|divisor| *divisor == 1.0) {
        return Ok(None);
    }
    // the longest wave says what is mixed with the frequency, even where none is long enough to be divided by all of it
    let last = divisors.len() - 1;
    let mut settings = Llama3 { factor: 1.0, low: 1.0, high: 4.0, original: 8192.0 };
    let kept = settings.kept(theta, last, divisors.len() * 2);
    settings.factor = short((1.0 - kept) / (1.0 / f64::from(divisors[last]) - kept));
    let expected = settings.divisors(theta, divisors.len() * 2);
    let near = divisors.iter().zip(&expected).all(|(x, y)| (x - y).abs() <= 1e-4 * y.abs());
    if !near {
        let expected = "divisors of frequencies by Llama 3's rule, with low factor 1, high factor 4 and old context 8192";
        return Err(keys.file.wrong(format!("tensor `{NAME}`"), expected, "others"));
    }
    Ok(Some(json!({
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": settings.factor,
        "low_freq_factor": settings.low,
        "high_freq_factor": settings.high,
        "original_max_position_embeddings": settings.original as u64,
    })))
}

/// Settings of Llama 3's scaling.
pub(super) struct Llama3 {
    pub(super) factor: f64,
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) original: f64,
}

impl Llama3 {
    /// What each frequency is divided by: 1 for wave lengths below `original / high`, `factor` for those above
    /// `original / low`, and between them a mixture of both frequencies.
    pub(super) fn divisors(&self, theta: f64, rotary_dim: usize) -> Vec<f32> {
        let of = |i: usize| {
            let kept = self.kept(theta, i, rotary_dim);
            (1.0 / ((1.0 - kept) / self.factor + kept)) as f32
        };
        (0..rotary_dim / 2).map(of).collect()
    }

    /// The share of a frequency that is not divided.
    fn kept(&self, theta: f64, i: usize, rotary_dim: usize) -> f64 {
        let frequency = 1.0 / theta.powf((2 * i) as f64 / rotary_dim as f64);
        let length = 2.0 * std::f64::consts::PI / frequency;
        ((self.original / length - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

fn gemma(
    keys: &Keys,
    config: &mut Map<String, Value>,
    rope: Value,
    layers: u64,
    width: u64,
    heads: u64,
) -> Result<()> {
    let third = keys.arch == Arch::Gemma3;
    let window = match keys.uint("attention.sliding_window")? {
        Some(window) => Some(window).filter(|window| *window > 0),
        None if third => None,
        None => Some(4096),
    };
    let pattern = "attention.sliding_window_pattern";
    let by_layer = keys.file.value(&keys.key(pattern)).and_then(|value| value.as_bools());
    let slides: Vec<bool> = match by_layer {
        Some(slides) if slides.len() as u64 >= layers => slides[..layers as usize].to_vec(),
        Some(slides) => {
            return Err(keys.wrong(
                pattern,
                format!("one for each of {layers} layers"),
                slides.len().to_string(),
            ));
        }
        None => {
            let every = keys.uint(pattern)?.unwrap_or(if third { 6 } else { 2 });
            (1..=layers).map(|layer| every == 0 || layer % every != 0).collect()
        }
    };
    let kind =
        |slides: &bool| if *slides && window.is_some() { "sliding_attention" } else { "full_attention" };
    let kinds: Vec<&str> = slides.iter().map(kind).collect();
    let head_dim = keys.uint("attention.key_length")?.unwrap_or(width / heads.max(1));
    let cap = |name: &str, default: f64| -> Result<Option<f64>> {
        let default = (!third).then_some(default);
        Ok(keys.float(name)?.or(default).filter(|cap| *cap != 0.0))
    };
    let (attention_cap, final_cap) =
        (cap("attn_logit_softcapping", 50.0)?, cap("final_logit_softcapping", 30.0)?);
    let theta = rope["rope_theta"].clone();
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("hidden_activation", json!("gelu_pytorch_tanh"));
    put("query_pre_attn_scalar", json!(scores_scalar(keys.arch, layers, width, heads, head_dim)));
    put("attn_logit_softcapping", json!(attention_cap));
    put("final_logit_softcapping", json!(final_cap));
    put("sliding_window", json!(window));
    put("layer_types", json!(kinds));
    if third {
        let local = keys.float("rope.freq_base_swa")?.unwrap_or(10_000.0);
        put("rope_theta", theta);
        put("rope_local_base_freq", json!(local));
        let sliding = json!({"rope_type": "default", "rope_theta": local});
        put("rope_parameters", json!({"full_attention": rope, "sliding_attention": sliding}));
    } else {
        put("rope_theta", theta);
        put("rope_parameters", rope);
    }
    Ok(())
}

/// Gemma's `query_pre_attn_scalar`, which files do not have: the width of a head, but for the 27B models, which readers
/// know by their number of layers.
pub(super) fn scores_scalar(arch: Arch, layers: u64, width: u64, heads: u64, head_dim: u64) -> u64 {
    let large = if arch == Arch::Gemma3 { 62 } else { 46 };
    if layers == large { width / heads.max(1) } else { head_dim }
}
