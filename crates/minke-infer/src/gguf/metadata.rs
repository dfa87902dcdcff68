//! Keys of a file from a config.

use minke_data::gguf::Value;
use minke_model::Config;
use serde_json::Value as Json;

use super::config::scores_scalar;
use super::names::Arch;

/// Keys and what they say.
pub type Metadata = Vec<(String, Value<'static>)>;

/// A model that GGUF has no words for, or whose words readers do not follow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config field `{field}`: {got} has no place in GGUF; {hint}")]
pub struct NoPlace {
    /// The field of `config.json`.
    pub field: String,
    /// What stands there.
    pub got: String,
    /// What a file could say.
    pub hint: String,
}

#[expect(clippy::needless_pass_by_value, reason = "what is shown is mostly a temporary")]
pub(super) fn no_place(field: &str, got: impl ToString, hint: impl Into<String>) -> NoPlace {
    NoPlace { field: field.to_owned(), got: got.to_string(), hint: hint.into() }
}

/// The keys that describe a model, without its tokenizer, and what a user should know of what other programs do with it.
///
/// # Errors
/// The config says something that no file can, or that its readers take for something else.
pub fn metadata(config: &Config) -> Result<(Metadata, Vec<String>), NoPlace> {
    let family = config.family.model_type();
    let arch = Arch::of(config).ok_or_else(|| {
        no_place(
            "model_type",
            format!("\"{family}\""),
            format!("one of {}", Arch::ALL.map(Arch::name).join(", ")),
        )
    })?;
    let json = config.to_json();
    let mut out = Out { arch, json: &json, keys: Vec::new(), notes: Vec::new() };
    out.put_plain("general.architecture", arch.name());
    out.put_plain("general.type", "model");
    out.number("context_length", "max_position_embeddings")?;
    out.number("embedding_length", "hidden_size")?;
    out.number("feed_forward_length", "intermediate_size")?;
    out.number("attention.head_count", "num_attention_heads")?;
    out.number("vocab_size", "vocab_size")?;
    out.put("attention.layer_norm_rms_epsilon", config.rms_norm_eps as f32);
    out.put("block_count", (config.num_hidden_layers + config.num_nextn_predict_layers) as u32);
    let (field, only) =
        if arch.is_gemma() { ("hidden_activation", "gelu_pytorch_tanh") } else { ("hidden_act", "silu") };
    if let Some(other) = json[field].as_str().filter(|found| *found != only) {
        return Err(no_place(
            field,
            format!("\"{other}\""),
            format!("only \"{only}\" in architecture {}", arch.name()),
        ));
    }
    match arch {
        Arch::Deepseek2 => out.latent(config)?,
        Arch::Llama | Arch::Qwen2 | Arch::Qwen3 | Arch::Qwen3Moe | Arch::Gemma2 | Arch::Gemma3 => {
            out.grouped()?;
        }
    }
    match arch {
        Arch::Gemma2 | Arch::Gemma3 => out.gemma(config)?,
        Arch::Llama | Arch::Qwen2 | Arch::Qwen3 | Arch::Qwen3Moe | Arch::Deepseek2 => {
            out.windows()?;
            out.rope(&json["rope_parameters"])?;
        }
    }
    Ok((out.keys, out.notes))
}

struct Out<'a> {
    arch: Arch,
    json: &'a Json,
    keys: Vec<(String, Value<'static>)>,
    notes: Vec<String>,
}

impl Out<'_> {
    fn put_plain(&mut self, key: &str, value: impl Into<Value<'static>>) {
        self.keys.push((key.to_owned(), value.into()));
    }

    fn put(&mut self, name: &str, value: impl Into<Value<'static>>) {
        self.put_plain(&format!("{}.{name}", self.arch.name()), value);
    }

    /// A whole number of the config.
    fn number(&mut self, name: &str, field: &str) -> Result<u64, NoPlace> {
        let found = self.json[field].as_u64();
        let number = found.and_then(|x| u32::try_from(x).ok());
        let number = number.ok_or_else(|| no_place(field, &self.json[field], "a whole number below 2^32"))?;
        self.put(name, number);
        Ok(u64::from(number))
    }

    fn grouped(&mut self) -> Result<(), NoPlace> {
        self.number("attention.head_count_kv", "num_key_value_heads")?;
        for name in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
            self.number(name, "head_dim")?;
        }
        if self.json["attention_bias"] == true && self.arch.is_gemma() {
            return Err(no_place("attention_bias", true, "this architecture has no biases"));
        }
        if self.arch == Arch::Qwen3Moe {
            self.number("expert_count", "num_experts")?;
            self.number("expert_used_count", "num_experts_per_tok")?;
            self.number("expert_feed_forward_length", "moe_intermediate_size")?;
            for (field, only) in [
                ("norm_topk_prob", Json::Bool(true)),
                ("decoder_sparse_step", Json::from(1)),
                ("mlp_only_layers", Json::Array(Vec::new())),
            ] {
                if self.json[field] != only {
                    return Err(no_place(
                        field,
                        &self.json[field],
                        format!("only {only} in architecture qwen3moe"),
                    ));
                }
            }
        }
        Ok(())
    }

    fn latent(&mut self, config: &Config) -> Result<(), NoPlace> {
        let json = self.json;
        let size = |field: &str| json[field].as_u64().unwrap_or(0);
        let (latent, rotated) = (size("kv_lora_rank"), size("qk_rope_head_dim"));
        // heads share one key and one value, the latent; these are their widths
        self.put("attention.head_count_kv", 1u32);
        self.put("attention.key_length", (latent + rotated) as u32);
        self.put("attention.value_length", latent as u32);
        self.put("attention.key_length_mla", (size("qk_nope_head_dim") + rotated) as u32);
        self.number("attention.value_length_mla", "v_head_dim")?;
        self.number("attention.kv_lora_rank", "kv_lora_rank")?;
        self.number("rope.dimension_count", "qk_rope_head_dim")?;
        // llama.cpp wants the key, and takes 0 for none
        self.put("attention.q_lora_rank", size("q_lora_rank") as u32);
        self.number("leading_dense_block_count", "first_k_dense_replace")?;
        self.number("expert_count", "n_routed_experts")?;
        self.number("expert_used_count", "num_experts_per_tok")?;
        self.number("expert_feed_forward_length", "moe_intermediate_size")?;
        if self.number("expert_shared_count", "n_shared_experts")? == 0 {
            self.notes
                .push("llama.cpp loads no model of this architecture without shared experts".to_owned());
        }
        self.put("expert_weights_scale", json["routed_scaling_factor"].as_f64().unwrap_or(1.0) as f32);
        self.put("expert_weights_norm", json["norm_topk_prob"] == true);
        self.put("expert_gating_func", if json["scoring_func"] == "sigmoid" { 2u32 } else { 1 });
        // one group is none, and llama.cpp takes a second look at groups
        if size("n_group") > 1 {
            self.number("expert_group_count", "n_group")?;
            self.number("expert_group_used_count", "topk_group")?;
            if json["topk_method"] == "group_limited_greedy" {
                let note = "llama.cpp ranks groups of experts by their best two, this model by their best";
                self.notes.push(note.to_owned());
            }
        }
        if size("moe_layer_freq") != 1 {
            return Err(no_place("moe_layer_freq", &json["moe_layer_freq"], "only 1"));
        }
        if !config.rope.interleaved {
            return Err(no_place("rope_interleave", false, "only true in architecture deepseek2"));
        }
        if config.num_nextn_predict_layers > 0 {
            self.put("nextn_predict_layers", config.num_nextn_predict_layers as u32);
        }
        if config.rms_norm_eps as f32 != minke_model::config::LATENT_NORM_EPS as f32 {
            let note = format!(
                "llama.cpp takes rms_norm_eps = {} for the norms of latents too, where folders mean {}",
                config.rms_norm_eps,
                minke_model::config::LATENT_NORM_EPS
            );
            self.notes.push(note);
        }
        Ok(())
    }

    /// Windows in architectures whose readers know of none.
    fn windows(&mut self) -> Result<(), NoPlace> {
        if self.json["use_sliding_window"] == true {
            return Err(no_place("use_sliding_window", true, "readers of this architecture know no windows"));
        }
        let window = self.json["sliding_window"].as_u64();
        let context = self.json["max_position_embeddings"].as_u64().unwrap_or(0);
        if let Some(window) = window.filter(|window| *window < context && self.arch == Arch::Llama) {
            self.notes.push(format!(
                "GGUF has no place for this model's window of {window} tokens: what is read from the file sees all tokens"
            ));
        }
        Ok(())
    }

    fn rope(&mut self, rope: &Json) -> Result<(), NoPlace> {
        let number = |field: &str| rope[field].as_f64();
        self.put("rope.freq_base", number("rope_theta").unwrap_or(10_000.0) as f32);
        let factor = number("factor").unwrap_or(1.0);
        match rope["rope_type"].as_str().unwrap_or("default") {
            // the last is a tensor: divisors of frequencies
            "default" | "llama3" => {}
            "linear" => {
                self.put("rope.scaling.type", "linear");
                self.put("rope.scaling.factor", factor as f32);
            }
            "yarn" => {
                self.put("rope.scaling.type", "yarn");
                self.put("rope.scaling.factor", factor as f32);
                let original = rope["original_max_position_embeddings"].as_u64().unwrap_or(0);
                self.put("rope.scaling.original_context_length", original as u32);
                for (name, field) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                    if let Some(beta) = number(field) {
                        self.put(&format!("rope.scaling.{name}"), beta as f32);
                    }
                }
                if rope["truncate"] == false {
                    return Err(no_place("rope_parameters.truncate", false, "only true"));
                }
                self.yarn_scale(rope, factor)?;
            }
            other => {
                let hint = "default, linear, llama3 or yarn";
                return Err(no_place("rope_parameters.rope_type", format!("\"{other}\""), hint));
            }
        }
        Ok(())
    }

    /// The multiplier of cosines and sines, and in DeepSeek's models that of scores.
    fn yarn_scale(&mut self, rope: &Json, factor: f64) -> Result<(), NoPlace> {
        let weight = |field: &str| rope[field].as_f64().filter(|x| *x != 0.0);
        let of = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        let (up, down) = (weight("mscale"), weight("mscale_all_dim"));
        let own = weight("attention_factor");
        if self.arch == Arch::Deepseek2 {
            if own.is_some() || up != down || up.is_none() {
                let hint = "in this architecture `mscale` and `mscale_all_dim` must be there and the same";
                return Err(no_place("rope_parameters.mscale", &rope["mscale"], hint));
            }
            self.put("rope.scaling.yarn_log_multiplier", 0.1 * down.unwrap_or(1.0) as f32);
            return Ok(());
        }
        let scale = own.or(up.zip(down).map(|(up, down)| of(up) / of(down)));
        if let Some(scale) = scale {
            self.put("rope.scaling.attn_factor", (scale / of(1.0)) as f32);
        }
        Ok(())
    }

    fn gemma(&mut self, config: &Config) -> Result<(), NoPlace> {
        let json = self.json;
        let size = |field: &str| json[field].as_u64().unwrap_or(0);
        let layers = config.num_hidden_layers as u64;
        let scalar = scores_scalar(
            self.arch,
            layers,
            size("hidden_size"),
            size("num_attention_heads"),
            size("head_dim"),
        );
        if json["query_pre_attn_scalar"].as_f64() != Some(scalar as f64) {
            let hint = format!("readers take {scalar} for a model of this shape");
            return Err(no_place("query_pre_attn_scalar", &json["query_pre_attn_scalar"], hint));
        }
        for (name, field) in [
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ] {
            match json[field].as_f64() {
                Some(cap) => self.put(name, cap as f32),
                // where nothing is said, readers of Gemma 2 have caps of their own
                None if self.arch == Arch::Gemma2 => self.put(name, 0f32),
                None => {}
            }
        }
        self.gemma_windows()?;
        if self.arch == Arch::Gemma2 {
            return self.rope(&json["rope_parameters"]);
        }
        self.rope(&json["rope_parameters"]["full_attention"])?;
        let sliding = &json["rope_parameters"]["sliding_attention"];
        if sliding["rope_type"].as_str().is_some_and(|kind| kind != "default") {
            let hint = "the rope of sliding layers has no scaling";
            return Err(no_place("rope_parameters.sliding_attention", sliding, hint));
        }
        self.put("rope.freq_base_swa", sliding["rope_theta"].as_f64().unwrap_or(10_000.0) as f32);
        Ok(())
    }

    fn gemma_windows(&mut self) -> Result<(), NoPlace> {
        let json = self.json;
        let kinds = json["layer_types"].as_array().cloned().unwrap_or_default();
        let slides: Vec<bool> = kinds.iter().map(|kind| kind == "sliding_attention").collect();
        if !slides.contains(&true) {
            if self.arch == Arch::Gemma2 {
                return Err(no_place(
                    "layer_types",
                    "no sliding layer",
                    "in this architecture every other layer slides",
                ));
            }
            return Ok(());
        }
        let fits =
            |every: &usize| slides.iter().enumerate().all(|(i, slides)| *slides == ((i + 1) % every != 0));
        let usual = if self.arch == Arch::Gemma3 { 6 } else { 2 };
        let every = [usual].into_iter().chain(1..=slides.len() + 1).find(fits);
        let every = every.ok_or_else(|| {
            no_place("layer_types", &json["layer_types"], "every layer slides but each n-th")
        })?;
        self.number("attention.sliding_window", "sliding_window")?;
        if every != usual {
            self.put("attention.sliding_window_pattern", every as u32);
        }
        Ok(())
    }
}
