//! Which tensor is stored in what: mixes of formats under one name.
//!
//! A mix is a format for most matrices, a finer one where errors cost most (the head, and in mixes called M the values of
//! attention and the way down of feed-forward blocks in half of the layers), and f32 for what is small: norms, biases,
//! routers. Names of tensors are those of GGUF, and the choices are llama.cpp's (`llama-quant.cpp`), so that a file of ours
//! is as large as one of theirs; what they leave to chance, the parts of latent attention, is chosen here.

use minke_data::gguf::TensorType;
use minke_num::blocks::BlockFormat;

/// A way of storing a whole model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mix {
    /// 8 bits everywhere: hardly to be told from 16.
    Q8_0,
    /// 6 bits everywhere.
    Q6K,
    /// 5 bits, 6 where it matters.
    Q5KM,
    /// 4 bits, 6 where it matters.
    Q4KM,
    /// 4 bits with one scale for 32.
    Q4_0,
}

/// What a choice depends on beside the tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Layers, those of prediction modules included.
    pub layers: usize,
    /// Routed experts of a layer; 0 without.
    pub experts: usize,
    /// Query heads that share a key head.
    pub heads_per_key: usize,
    /// Whether the embedding is the head.
    pub tied: bool,
    /// Whether scales are fitted with an importance of each column.
    pub importance: bool,
    /// What a matrix is stored in whose rows no block fills.
    pub plain: TensorType,
}

/// What a tensor does, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Embedding,
    Head,
    Keys,
    Values,
    /// Of latent attention: small, and read by all heads.
    Latent,
    Attended,
    Down,
    Other,
    /// Not a matrix, or one that chooses.
    Small,
}

impl Part {
    fn of(name: &str, shape: &[usize]) -> Self {
        let kind =
            name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, kind)| kind);
        let Some(kind) = kind.strip_suffix(".weight").filter(|_| shape.len() > 1) else { return Self::Small };
        match kind {
            _ if kind.ends_with("_norm") => Self::Small,
            "ffn_gate_inp" | "ffn_gate_inp_shexp" | "position_embd" | "token_types" | "ssm_conv1d" => {
                Self::Small
            }
            "token_embd" => Self::Embedding,
            "output" => Self::Head,
            "attn_k" => Self::Keys,
            "attn_v" | "attn_qkv" | "attn_kv_b" | "attn_v_b" => Self::Values,
            "attn_kv_a_mqa" | "attn_k_b" => Self::Latent,
            "attn_output" => Self::Attended,
            "ffn_down" | "ffn_down_exps" | "ffn_down_shexp" => Self::Down,
            _ => Self::Other,
        }
    }
}

impl Mix {
    /// All of them, the largest first.
    pub const ALL: [Self; 5] = [Self::Q8_0, Self::Q6K, Self::Q5KM, Self::Q4KM, Self::Q4_0];

    /// The name, as GGUF tools have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "Q8_0",
            Self::Q6K => "Q6_K",
            Self::Q5KM => "Q5_K_M",
            Self::Q4KM => "Q4_K_M",
            Self::Q4_0 => "Q4_0",
        }
    }

    /// The mix of a name, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mix| mix.name().eq_ignore_ascii_case(name))
    }

    /// Its number in `general.file_type` (`llama_ftype`).
    pub fn file_type(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q4KM => 15,
            Self::Q5KM => 17,
            Self::Q6K => 18,
        }
    }

    /// The format of most matrices.
    pub fn usual(self) -> BlockFormat {
        match self {
            Self::Q8_0 => BlockFormat::Q8_0,
            Self::Q6K => BlockFormat::Q6K,
            Self::Q5KM => BlockFormat::Q5K,
            Self::Q4KM => BlockFormat::Q4K,
            Self::Q4_0 => BlockFormat::Q4_0,
        }
    }

    /// What the tensor `name` of `shape` (outermost axis first) is stored in.
    pub fn form(self, name: &str, shape: &[usize], facts: &Facts) -> TensorType {
        let Some(format) = self.meant(name, shape, facts) else { return TensorType::F32 };
        fitting(format, shape.last().copied().unwrap_or(0)).map_or(facts.plain, TensorType::Blocks)
    }

    /// The format of a tensor whose rows it fills; none for what is small.
    pub fn meant(self, name: &str, shape: &[usize], facts: &Facts) -> Option<BlockFormat> {
        match Part::of(name, shape) {
            Part::Small => None,
            Part::Head => Some(self.of_head()),
            Part::Embedding if facts.tied => Some(self.of_head()),
            part => Some(self.of_matrix(part, layer(name).unwrap_or(0), facts)),
        }
    }

    fn of_head(self) -> BlockFormat {
        if self == Self::Q8_0 { BlockFormat::Q8_0 } else { BlockFormat::Q6K }
    }

    fn of_matrix(self, part: Part, layer: usize, facts: &Facts) -> BlockFormat {
        let usual = self.usual();
        let of_few_experts = facts.experts == 8;
        let finer = matches!(self, Self::Q4KM | Self::Q5KM);
        match part {
            // beside eight experts these are small
            Part::Keys | Part::Values if of_few_experts => BlockFormat::Q8_0,
            Part::Values | Part::Down if finer && takes_more_bits(layer, facts.layers) => BlockFormat::Q6K,
            // shared by many heads, and the smaller for it
            Part::Values if self == Self::Q4KM && facts.layers == 80 && facts.heads_per_key > 1 => {
                BlockFormat::Q5K
            }
            Part::Latent if finer => BlockFormat::Q6K,
            Part::Attended if of_few_experts && self == Self::Q4KM => BlockFormat::Q5K,
            // the first layers have columns that a plain scale does badly by
            Part::Down if self == Self::Q4_0 && facts.importance && layer < facts.layers / 8 => {
                BlockFormat::Q4_1
            }
            _ => usual,
        }
    }
}

/// The first and last eighth of the layers, and every third between.
fn takes_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// The layer in a name.
fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

/// The format, or where super-blocks do not fill rows the next finer one that does.
fn fitting(format: BlockFormat, cols: usize) -> Option<BlockFormat> {
    let fits = |format: BlockFormat| (cols > 0 && format.row_bytes(cols).is_some()).then_some(format);
    let instead = match format {
        BlockFormat::Q2K | BlockFormat::Q3K => BlockFormat::Q4_0,
        BlockFormat::Q4K => BlockFormat::Q5_0,
        BlockFormat::Q5K => BlockFormat::Q5_1,
        BlockFormat::Q6K => BlockFormat::Q8_0,
        BlockFormat::Iq4Xs => BlockFormat::Iq4Nl,
        BlockFormat::Q4_0
        | BlockFormat::Q4_1
        | BlockFormat::Q5_0
        | BlockFormat::Q5_1
        | BlockFormat::Q8_0
        | BlockFormat::Iq4Nl => format,
    };
    fits(format).or_else(|| fits(instead))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENSE: Facts = Facts {
        layers: 18,
        experts: 0,
        heads_per_key: 4,
        tied: true,
        importance: false,
        plain: TensorType::Bf16,
    };

    fn of(mix: Mix, tensor: &str, shape: &[usize], facts: &Facts) -> &'static str {
        mix.form(tensor, shape, facts).name()
    }

    /// The published Q4_K_M file of Gemma 3 270M, whose rows of 640 no super-block fills.
    #[test]
    fn a_published_file() {
        let finer = [0, 1, 4, 7, 10, 13, 15, 16, 17];
        for layer in 0..18 {
            let of = |part: &str, shape: &[usize]| {
                of(Mix::Q4KM, &format!("blk.{layer}.{part}.weight"), shape, &DENSE)
            };
            let is_finer = finer.contains(&layer);
            assert_eq!(of("attn_v", &[256, 640]), if is_finer { "Q8_0" } else { "Q5_0" }, "{layer}");
            assert_eq!(of("ffn_down", &[640, 2048]), if is_finer { "Q6_K" } else { "Q4_K" }, "{layer}");
            assert_eq!(of("attn_k", &[256, 640]), "Q5_0");
            assert_eq!(of("attn_output", &[640, 1024]), "Q4_K");
            assert_eq!(of("ffn_gate", &[2048, 640]), "Q5_0");
            assert_eq!(of("attn_k_norm", &[256]), "F32");
        }
        assert_eq!(of(Mix::Q4KM, "token_embd.weight", &[262_144, 640], &DENSE), "Q8_0");
        assert_eq!(of(Mix::Q4KM, "output_norm.weight", &[640], &DENSE), "F32");
    }

    #[test]
    fn heads_embeddings_and_small_tensors() {
        let untied = Facts { tied: false, ..DENSE };
        for (mix, head, table) in [
            (Mix::Q8_0, "Q8_0", "Q8_0"),
            (Mix::Q6K, "Q6_K", "Q6_K"),
            (Mix::Q5KM, "Q6_K", "Q5_K"),
            (Mix::Q4KM, "Q6_K", "Q4_K"),
            (Mix::Q4_0, "Q6_K", "Q4_0"),
        ] {
            assert_eq!(of(mix, "output.weight", &[1000, 512], &untied), head);
            assert_eq!(of(mix, "token_embd.weight", &[1000, 512], &untied), table);
            assert_eq!(of(mix, "token_embd.weight", &[1000, 512], &DENSE), head);
            for small in ["blk.3.ffn_gate_inp.weight", "blk.3.attn_q_a_norm.weight", "blk.3.attn_q.bias"] {
                assert_eq!(of(mix, small, &[64, 512], &DENSE), "F32");
            }
            assert_eq!(of(mix, "blk.3.exp_probs_b.bias", &[64], &DENSE), "F32");
            assert_eq!(of(mix, "blk.3.ffn_up.weight", &[64, 40], &DENSE), "BF16");
            assert_eq!(Mix::from_name(&mix.name().to_lowercase()), Some(mix));
        }
        assert_eq!(Mix::from_name("Q4_K"), None);
    }

    #[test]
    fn rows_that_super_blocks_do_not_fill() {
        let up = |mix, cols| of(mix, "blk.5.ffn_up.weight", &[64, cols], &DENSE);
        assert_eq!([up(Mix::Q4KM, 256), up(Mix::Q5KM, 256), up(Mix::Q6K, 256)], ["Q4_K", "Q5_K", "Q6_K"]);
        assert_eq!([up(Mix::Q4KM, 96), up(Mix::Q5KM, 96), up(Mix::Q6K, 96)], ["Q5_0", "Q5_1", "Q8_0"]);
        assert_eq!([up(Mix::Q4KM, 97), up(Mix::Q8_0, 16), up(Mix::Q4_0, 0)], ["BF16"; 3]);
    }

    #[test]
    fn experts_and_latents() {
        let moe = Facts { layers: 24, experts: 64, tied: false, ..DENSE };
        let experts = [64, 512, 256];
        assert_eq!(of(Mix::Q4KM, "blk.2.ffn_down_exps.weight", &experts, &moe), "Q6_K");
        assert_eq!(of(Mix::Q4KM, "blk.3.ffn_down_exps.weight", &experts, &moe), "Q4_K");
        assert_eq!(of(Mix::Q4KM, "blk.2.ffn_down_shexp.weight", &[512, 512], &moe), "Q6_K");
        assert_eq!(of(Mix::Q5KM, "blk.2.ffn_up_exps.weight", &experts, &moe), "Q5_K");
        assert_eq!(of(Mix::Q4KM, "blk.3.attn_kv_a_mqa.weight", &[576, 2048], &moe), "Q6_K");
        assert_eq!(of(Mix::Q4KM, "blk.3.attn_k_b.weight", &[16, 512, 128], &moe), "Q8_0");
        assert_eq!(of(Mix::Q4KM, "blk.2.attn_v_b.weight", &[16, 128, 512], &moe), "Q6_K");
        assert_eq!(of(Mix::Q4KM, "blk.3.attn_v_b.weight", &[16, 128, 512], &moe), "Q4_K");
        assert_eq!(of(Mix::Q4KM, "blk.3.attn_q_b.weight", &[3072, 1536], &moe), "Q4_K");
        let eight = Facts { experts: 8, ..moe };
        assert_eq!(of(Mix::Q4KM, "blk.3.attn_v.weight", &[512, 2048], &eight), "Q8_0");
        assert_eq!(of(Mix::Q4KM, "blk.3.attn_output.weight", &[512, 2048], &eight), "Q5_K");
        let first =
            |importance| of(Mix::Q4_0, "blk.2.ffn_down.weight", &[512, 2048], &Facts { importance, ..moe });
        assert_eq!([first(true), first(false)], ["Q4_1", "Q4_0"]);
        let large = Facts { layers: 80, experts: 0, heads_per_key: 8, ..moe };
        assert_eq!(of(Mix::Q4KM, "blk.11.attn_v.weight", &[1024, 8192], &large), "Q5_K");
    }
}
