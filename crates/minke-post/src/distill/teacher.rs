//! What can be known of a model before it is loaded: whether it fits, to another model and into memory.

use std::path::PathBuf;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_data::template::ChatTemplate;
use minke_infer::{ModelFiles, load_model};
use minke_model::{Config, DType, Model, Precision, Purpose, WeightSource, spec};

use crate::error::{PostError, Result};
use crate::events::Event;
use crate::fingerprint;
use crate::session::Setup;

/// Training holds masters, gradients and two moments in f32, and two packed copies of the weights.
const TRAINING_F32: u64 = 4;
const PACKED: u64 = 2;

/// A model that is not loaded yet, or not made yet.
#[derive(Debug, Clone)]
pub struct Known {
    /// The recipe's key for it.
    pub key: &'static str,
    /// Its folder or GGUF file; a model that is still to be made has none.
    pub folder: Option<PathBuf>,
    /// Its sizes.
    pub config: Config,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
}

impl Known {
    /// Reads all but the weights of the model that `argument` means; `key` is what messages call it.
    ///
    /// # Errors
    /// There is no such model, or it has no tokenizer.
    pub fn look(key: &'static str, argument: &str) -> Result<Self> {
        let files = ModelFiles::find(argument)?;
        let Some(tokenizer) = files.tokenizer()? else {
            return Err(PostError::unsuitable(key, format!("{} has no tokenizer", files.path.display())));
        };
        let template = files.template()?;
        let ModelFiles { path: folder, config, .. } = files;
        Ok(Self { key, folder: Some(folder), config, tokenizer, template })
    }

    /// Most tokens of a text.
    pub fn context(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// Refuses a student whose tokens mean something else than this teacher's.
    ///
    /// # Errors
    /// Tokenizers or vocabularies that differ, saying both.
    pub fn speaks_with(&self, student: &Self) -> Result<()> {
        let short = |tokenizer: &Tokenizer| {
            let digits = &blake3::Hash::from_bytes(tokenizer.fingerprint()).to_hex()[..8];
            format!("{} tokens, fingerprint {digits}", tokenizer.vocab_size())
        };
        let reason = if self.tokenizer.fingerprint() != student.tokenizer.fingerprint() {
            format!(
                "the teacher's tokenizer ({}) and the student's ({}) differ: a token of one is not the same text in \
                 the other; take a student with the teacher's tokenizer, or a fresh one with [student.model]",
                short(&self.tokenizer),
                short(&student.tokenizer)
            )
        } else if self.config.vocab_size != student.config.vocab_size {
            format!(
                "the teacher's vocabulary has {} rows and the student's {}: their distributions cannot be compared",
                self.config.vocab_size, student.config.vocab_size
            )
        } else {
            return Ok(());
        };
        Err(PostError::unsuitable(student.key, reason))
    }

    /// The widest type that the weights compute in.
    fn width(&self, precision: Option<Precision>) -> Result<u64> {
        let widest = |wide: bool| if wide { 4 } else { 2 };
        if let Some(Precision { linear, expert, attention, head, .. }) = precision {
            return Ok(widest([linear, expert, attention, head].contains(&DType::F32)));
        }
        let Some(folder) = &self.folder else { return Ok(widest(true)) };
        let weights = ModelFiles::open(folder)?.weights()?;
        let matrix = |name: &String| weights.shape(name).is_some_and(|shape| shape.len() > 1);
        Ok(widest(
            weights
                .names()
                .iter()
                .filter(|name| matrix(name))
                .any(|name| weights.dtype(name) != Some(DType::Bf16) && !weights.is_coded(name)),
        ))
    }

    fn parameters(&self) -> u64 {
        let counts = spec::parameters(&self.config);
        counts.total + counts.mtp
    }

    /// Bytes that it takes to run it: masters in f32, and a packed copy; of weights in FP8 a byte, and a scale for 128.
    ///
    /// # Errors
    /// The weights cannot be looked at.
    pub fn bytes_to_run(&self, precision: Option<Precision>) -> Result<u64> {
        let each = 4 + self.width(precision)?;
        let folder = self.folder.as_ref().filter(|_| precision.is_none());
        let weights = folder.map(|folder| ModelFiles::open(folder)?.weights()).transpose()?;
        let coded = |tensor: &spec::TensorSpec| match (precision, &weights) {
            (Some(precision), _) => precision.coded.of(tensor.role).is_some(),
            (None, Some(weights)) => weights.is_coded(&tensor.name),
            (None, None) => false,
        };
        let in_fp8: u64 =
            spec::tensors(&self.config).iter().filter(|t| coded(t)).map(|t| t.numel() as u64).sum();
        let numbers = self.parameters().saturating_sub(in_fp8).saturating_mul(each);
        Ok(numbers.saturating_add(in_fp8 + in_fp8 / 32))
    }

    /// Bytes that it takes to train it, activations apart.
    ///
    /// # Errors
    /// The weights cannot be looked at.
    pub fn bytes_to_train(&self, setup: &Setup) -> Result<u64> {
        let each = TRAINING_F32 * 4 + PACKED * self.width(setup.precision)?;
        Ok(self.parameters().saturating_mul(each))
    }

    /// blake3 of config and weights, in hexadecimal.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        self.folder.as_ref().map_or(Ok(String::new()), |folder| fingerprint::of_weights(folder))
    }

    /// Loads it.
    ///
    /// # Errors
    /// Its weights are not those that its config asks for.
    ///
    /// # Panics
    /// When it is still to be made.
    pub fn load(
        &self,
        precision: Option<Precision>,
        cpu: &Cpu,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Model> {
        let folder = self.folder.as_ref().expect("a teacher has a folder");
        let loaded = load_model(&folder.to_string_lossy(), precision, Purpose::Run(cpu))?;
        for note in &loaded.notes {
            on_event(Event::Warning { text: &format!("teacher: {note}") });
        }
        Ok(loaded.model)
    }
}

/// Refuses a teacher and a student, with the bytes that each takes, that `available` bytes do not hold.
///
/// # Errors
/// They do not fit.
pub fn fits([teacher, student]: [u64; 2], available: Option<u64>) -> Result<()> {
    let Some(available) = available.filter(|&available| teacher.saturating_add(student) > available) else {
        return Ok(());
    };
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64);
    Err(PostError::unsuitable(
        "teacher.path",
        format!(
            "the teacher takes {} and training the student {}, and {} of memory are left; take a smaller teacher, \
             teacher.precision = \"bf16\", or distil from its answers (distill.mode = \"sequences\")",
            gib(teacher),
            gib(student),
            gib(available)
        ),
    ))
}
