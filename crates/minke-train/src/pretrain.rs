//! A run from a recipe to a model: the orchestrator.
//!
//! ```text
//! recipe -> run folder -> data (prepared once, cached) -> model -> [step, evaluation, sample, checkpoint]* -> report
//! ```
//!
//! Everything that decides a weight is a function of the recipe, the data and the step: batches by (seed, step),
//! rates by (step, steps), draws by (seed, stream). So what a checkpoint must hold is small, and a run that was
//! killed and resumed gives the weights of one that was not.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use minke_cpu::Cpu;
use minke_data::{
    DataSettings, Evaluation, Loader, LoaderOptions, Prepared, TokenizerSpec, TrainOptions, compress,
    expand_path,
};
use minke_infer::machine::{available_bytes, gemm_peak_gflops, median};
use minke_model::{Model, Precision, spec};

use crate::checkpoint::{self, Checkpoint, Checkpoints, State};
use crate::error::{Result, TrainError};
use crate::eval::{self, Score};
use crate::events::{Event, Started};
use crate::metrics::{self, Balance, MetricsWriter, Record, SampleText};
use crate::optim::Settings;
use crate::plan::{self, Shape};
use crate::recipe::{self, Document, Recipe, RecipeError, Resolved};
use crate::report::{Baseline, Report, Yardstick};
use crate::resume;
use crate::run_folder::{self, RunFolder};
use crate::trainer::{Course, Trainer};

/// Text that a vocabulary is trained on.
const TOKENIZER_SAMPLE_BYTES: u64 = 16 << 20;
/// Held-out tokens of the last evaluation, whose figure the report has, unless the recipe asks for more.
const FINAL_EVAL_TOKENS: u64 = 1 << 18;

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The recipe's file.
    pub recipe: PathBuf,
    /// `a.b=v`, in order.
    pub overrides: Vec<String>,
    /// The run's folder instead of the recipe's.
    pub out: Option<PathBuf>,
    /// Whether to go on from the last checkpoint.
    pub resume: bool,
    /// Threads; 0 for as many as there are cores.
    pub threads: usize,
    /// Whether to start what needs more memory than there is.
    pub force: bool,
    /// Where prepared data is kept; by default `.data` beside the run's folder, so that runs share it.
    pub cache: Option<PathBuf>,
}

impl Options {
    /// The recipe, parsed, which is written to [`Options::out`] where that is given.
    ///
    /// # Errors
    /// An unreadable file and invalid TOML, with the place.
    pub fn document(&self) -> Result<Document, RecipeError> {
        Ok(Document::load(&self.recipe, &self.overrides)?.written_to(self.out.as_deref()))
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The run's folder.
    pub folder: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// The last checkpoint; none when the run was stopped before its first step.
    pub checkpoint: Option<PathBuf>,
    /// What came of it; none when the run was stopped.
    pub finished: Option<Finished>,
}

/// What a run that reached its end left.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// The model's folder.
    pub model: PathBuf,
    /// The report.
    pub report: PathBuf,
    /// Bits per byte of held-out text, if any was held out.
    pub bits_per_byte: Option<f64>,
    /// What zstd needs for the same text.
    pub zstd_bits_per_byte: Option<f64>,
}

/// Trains. `stop` ends the run after the step in work, with a checkpoint.
///
/// # Errors
/// Anything that [`TrainError`] lists; what was on the disk before stays whole.
pub fn run(options: &Options, stop: &AtomicBool, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
    let recipe = Recipe::read(&options.document()?)?;
    if recipe.data().random {
        let reason = "random tokens are for `bench train`; training needs data.sources".to_owned();
        return Err(TrainError::Unsuitable { key: "data.random", reason });
    }
    // an impossible model is said before minutes are spent on data
    let early = match given_tokenizer(&recipe)? {
        Some(tokenizer) => recipe.resolve_with_vocabulary(tokenizer.vocab_size())?,
        None => recipe.resolve()?,
    };
    // so is a run that there is nothing of
    if let Some(folder) = &early.baseline
        && baseline(folder)?.records.is_empty()
    {
        let reason = format!("no metrics of a run in {folder}");
        return Err(TrainError::Unsuitable { key: "run.baseline", reason });
    }
    let cpu = Cpu::detect(options.threads);
    if !options.force {
        let warning = plan::check(&Shape::from(&early), &cpu, available_bytes())?;
        if let Some(text) = warning {
            on_event(Event::Warning { text });
        }
    }
    let out = Path::new(&early.run.out);
    let folder = RunFolder::take(out, options.resume)?;
    let resumed = if options.resume { find(&folder, &early, on_event)? } else { None };
    let cache = options.cache.clone().unwrap_or_else(|| {
        let beside = out.parent().filter(|parent| !parent.as_os_str().is_empty());
        beside.unwrap_or(Path::new(".")).join(".data")
    });
    let prepared = data(&early, &cache, cpu.threads(), resumed.as_ref(), on_event)?;
    on_event(Event::DataReady {
        stats: prepared.stats,
        reused: prepared.reused,
        vocabulary: prepared.tokenizer.vocab_size(),
    });
    let mut recipe = recipe.resolve_with_vocabulary(prepared.tokenizer.vocab_size())?;
    complete(&mut recipe, &prepared);
    if let Some(resumed) = &resumed {
        resume::check_recipe(folder.path(), &resumed.recipe, &recipe)?;
    }
    let checkpoint = resumed.and_then(|resumed| resumed.checkpoint);
    let mut session = Session::start(recipe, cpu, folder, prepared, checkpoint.as_ref(), on_event)?;
    session.go(stop).map_err(|error| session.checkpoints.explain(error))
}

/// What the folder to be resumed says.
struct Resumed {
    /// Its recipe, as stored.
    recipe: String,
    /// Whether it was prepared from the same sources in the same way.
    same_data: bool,
    checkpoint: Option<Checkpoint>,
}

fn find(folder: &RunFolder, now: &Resolved, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Option<Resumed>> {
    let path = folder.recipe();
    let recipe = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = format!("there is no run in {} yet: starting it", folder.path().display());
            on_event(Event::Warning { text: &text });
            return Ok(None);
        }
        Err(error) => return Err(TrainError::io("read", &path)(error)),
    };
    let same_data = resume::same_data(folder.path(), &recipe, now)?;
    let checkpoint =
        checkpoint::newest(&folder.checkpoints(), &mut |text| on_event(Event::Warning { text }))?;
    if checkpoint.is_none() {
        on_event(Event::Warning { text: "the run has no checkpoint yet: starting from its first step" });
    }
    Ok(Some(Resumed { recipe, same_data, checkpoint }))
}

fn given_tokenizer(recipe: &Recipe) -> Result<Option<minke_data::Tokenizer>> {
    let Some(path) = &recipe.data().tokenizer else { return Ok(None) };
    Ok(Some(minke_data::Tokenizer::load(expanded(path)?)?))
}

fn expanded(path: &str) -> Result<PathBuf> {
    expand_path(path).map_err(|reason| TrainError::Unsuitable { key: "data.tokenizer", reason })
}

/// The run's own data if it is still in the cache, whatever became of the sources; else prepared again, and it must
/// come out the same.
fn data(
    recipe: &Resolved,
    cache: &Path,
    threads: usize,
    resumed: Option<&Resumed>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Prepared> {
    let state = resumed.and_then(|resumed| resumed.checkpoint.as_ref().map(|at| (resumed, at)));
    if let Some((Resumed { same_data: true, .. }, at)) = state
        && at.state.data.chars().all(|c| c.is_ascii_alphanumeric())
        && let Ok(Some(prepared)) = minke_data::prepare::reopen(&cache.join(&at.state.data))
    {
        return Ok(prepared);
    }
    let data = &recipe.data;
    let tokenizer = match &data.tokenizer {
        Some(path) => TokenizerSpec::File(expanded(path)?),
        None => TokenizerSpec::Train {
            options: TrainOptions {
                vocab_size: data.vocab_size.unwrap_or(recipe.config.vocab_size),
                ..TrainOptions::default()
            },
            sample_bytes: TOKENIZER_SAMPLE_BYTES,
        },
    };
    let settings = DataSettings {
        sources: data.specs(),
        validation_share: data.validation_share,
        split_by_group: true,
        tokenizer,
        cache: cache.to_owned(),
        threads,
    };
    let prepared = minke_data::prepare(&settings, &mut |progress| on_event(Event::from(progress)))?;
    if let Some((_, at)) = state
        && fingerprint(&prepared) != at.state.data
    {
        let differences = format!(
            "  data: was {}, is {} (files were added, removed or changed since, and the prepared data is not in {})",
            at.state.data,
            fingerprint(&prepared),
            cache.display()
        );
        return Err(TrainError::Changed { path: PathBuf::from(&recipe.run.out), differences });
    }
    Ok(prepared)
}

/// The name of the prepared data, which is a hash of all that decides it.
fn fingerprint(prepared: &Prepared) -> String {
    prepared.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The evaluations of the run in `folder`.
fn baseline(folder: &str) -> Result<Baseline> {
    let folder = Path::new(folder);
    let records = metrics::read(&folder.join("metrics.jsonl"))?;
    let name =
        folder.file_name().map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into());
    Ok(Baseline { name, records })
}

/// What the data and the precision say about the model's config.
fn complete(recipe: &mut Resolved, prepared: &Prepared) {
    let config = &mut recipe.config;
    config.bos_token_id = config.bos_token_id.or(prepared.tokenizer.bos());
    if config.eos_token_id.is_empty() {
        config.eos_token_id.extend(prepared.tokenizer.eos());
    }
    let half = recipe.precision.linear != recipe::Dtype::F32;
    config.dtype = Some(if half { "bfloat16" } else { "float32" }.to_owned());
}

/// A run in work.
struct Session<'a> {
    recipe: Resolved,
    cpu: Cpu,
    folder: RunFolder,
    prepared: Prepared,
    trainer: Trainer,
    loader: Loader,
    held_out: Option<Evaluation>,
    metrics: MetricsWriter,
    gemm_peak_gflops: f64,
    flops_per_token: u64,
    /// Seconds of earlier parts of the run.
    before_s: f64,
    start: Instant,
    /// The first step of this part.
    first: u64,
    checkpoints: Checkpoints,
    score: Option<Score>,
    on_event: &'a mut dyn FnMut(Event<'_>),
}

impl<'a> Session<'a> {
    fn start(
        recipe: Resolved,
        cpu: Cpu,
        folder: RunFolder,
        prepared: Prepared,
        checkpoint: Option<&Checkpoint>,
        on_event: &'a mut dyn FnMut(Event<'_>),
    ) -> Result<Self> {
        let train = &recipe.train;
        let loading = LoaderOptions {
            sequence_len: train.sequence_length,
            batch: train.batch_size,
            seed: recipe.run.seed,
            mtp_depth: recipe.config.num_nextn_predict_layers,
            document_borders: recipe.data.document_borders,
            packing: recipe.data.packing,
        };
        let loader = Loader::new(prepared.train.clone(), loading)?;
        let held_out = prepared
            .validation
            .clone()
            .map(|shards| Evaluation::new(shards, LoaderOptions { mtp_depth: 0, ..loading }));
        let held_out = held_out.transpose()?;
        let model = Model::random(recipe.config.clone(), Precision::from(recipe.precision), recipe.run.seed);
        let mut trainer = Trainer::new(model, &Settings::from(&train.optim), Course::from(&recipe));
        if let Some(checkpoint) = checkpoint {
            checkpoint.restore(&mut trainer)?;
        }
        let first = trainer.steps_done();
        // the recipe first: a folder with anything in it has one
        run_folder::replace(&folder.recipe(), recipe.to_toml().as_bytes())?;
        let mut warn = |text: &str| on_event(Event::Warning { text });
        let metrics = MetricsWriter::resume(&folder.metrics(), first, &mut warn)?;
        let counts = spec::parameters(&recipe.config);
        let linear = Precision::from(recipe.precision).linear;
        let session = Self {
            gemm_peak_gflops: gemm_peak_gflops(&cpu, linear),
            flops_per_token: spec::flops_per_token(&recipe.config, train.sequence_length, true).training(),
            before_s: checkpoint.map_or(0.0, |checkpoint| checkpoint.state.elapsed_s),
            start: Instant::now(),
            first,
            checkpoints: Checkpoints::new(folder.checkpoints(), train.keep, checkpoint)?,
            score: None,
            recipe,
            cpu,
            folder,
            prepared,
            trainer,
            loader,
            held_out,
            metrics,
            on_event,
        };
        (session.on_event)(Event::Started(&Started {
            name: session.recipe.run.name.clone(),
            folder: session.folder.path().to_owned(),
            step: first,
            steps: session.recipe.steps(),
            tokens_per_step: session.recipe.tokens_per_step(),
            parameters: counts.total + counts.mtp,
            active_parameters: counts.active,
            train_tokens: session.prepared.train.tokens(),
            held_out_tokens: session.prepared.validation.as_ref().map_or(0, minke_data::ShardSet::tokens),
            padding_share: session.loader.padding_share(),
            threads: session.cpu.threads(),
            level: session.cpu.level().name(),
            gemm_peak_gflops: session.gemm_peak_gflops,
            flops_per_token: session.flops_per_token,
        }));
        Ok(session)
    }

    fn go(&mut self, stop: &AtomicBool) -> Result<Outcome> {
        let steps = self.recipe.steps();
        let mut step = self.first;
        let due = |step: u64, every: u64| every > 0 && step.is_multiple_of(every);
        let mut saved_at = self.checkpoints.newest.is_some().then_some(step);
        while step < steps && !stop.load(Ordering::Relaxed) {
            self.step(steps)?;
            step += 1;
            let taken = self.trainer.skipped_in_a_row() == 0;
            if taken {
                self.checkpoints.settle()?;
            }
            let train = &self.recipe.train;
            let last = step == steps;
            let (evaluates, samples) = (due(step, train.eval_every), due(step, train.sample_every));
            let saves = due(step, train.checkpoint_every) || last;
            if evaluates || last {
                let tokens = if last { self.final_eval_tokens() } else { train.eval_tokens };
                self.score = self.evaluate(step, tokens)?;
            }
            if samples || last {
                self.sample(step)?;
            }
            // a step that was skipped may be the work of weights that are no good any more
            if saves && taken {
                self.save(step)?;
                saved_at = Some(step);
            }
        }
        if step > 0 && saved_at != Some(step) {
            // what a skipped step left is as good as its loss on other text
            let skipped = self.trainer.skipped_in_a_row() > 0;
            if skipped && self.score_held_out(self.recipe.train.eval_tokens)?.is_none() {
                return Err(self.trainer.ran_away());
            }
            self.save(step)?;
        }
        if step == 0 {
            self.folder.clear()?;
        }
        let finished = if step == steps { Some(self.finish()?) } else { None };
        let folder = self.folder.path().to_owned();
        Ok(Outcome { folder, step, steps, checkpoint: self.checkpoints.newest.clone(), finished })
    }

    fn elapsed_s(&self) -> f64 {
        self.before_s + self.start.elapsed().as_secs_f64()
    }

    fn step(&mut self, steps: u64) -> Result<()> {
        let start = Instant::now();
        let accumulation = self.recipe.train.accumulation as u64;
        let first = self.trainer.steps_done() * accumulation;
        let mut micro = Vec::with_capacity(accumulation as usize);
        for index in first..first + accumulation {
            micro.push(crate::batch::from_rows(&self.loader.batch(index)?));
        }
        let before = self.trainer.tally();
        let report = self.trainer.step(&self.cpu, &micro)?;
        let tok_s = self.recipe.tokens_per_step() as f64 / start.elapsed().as_secs_f64();
        let reached = tok_s * self.flops_per_token as f64 / 1e9;
        let metrics = metrics::Step {
            step: report.step,
            tokens: report.step * self.recipe.tokens_per_step(),
            loss: report.loss,
            mtp_loss: report.mtp_loss,
            balance_loss: (!report.counts.is_empty()).then_some(report.balance_loss),
            lr: report.rates.adamw,
            grad_norm: report.grad_norm,
            skipped: report.skipped.is_some(),
            tok_s,
            gemm_share: Some(reached / self.gemm_peak_gflops),
            elapsed_s: self.elapsed_s(),
            balance: (!report.counts.is_empty()).then(|| Balance::from_counts(&report.counts)),
        };
        let pace = self.start.elapsed().as_secs_f64() / (report.step - self.first) as f64;
        let remaining_s = pace * (steps - report.step) as f64;
        (self.on_event)(Event::Step { metrics: &metrics, steps, remaining_s });
        if let Some(text) = self.trainer.skip_warning(metrics.step, self.trainer.tally().since(before)) {
            (self.on_event)(Event::Warning { text: &text });
        }
        Ok(self.metrics.append(&Record::Step(metrics))?)
    }

    /// Held-out tokens of the last evaluation.
    fn final_eval_tokens(&self) -> u64 {
        self.recipe.train.eval_tokens.max(FINAL_EVAL_TOKENS)
    }

    /// Scores so many tokens of the held-out text that the last evaluation reads, if there is any; its loss is finite.
    fn score_held_out(&mut self, tokens: u64) -> Result<Option<Score>> {
        let of = self.final_eval_tokens();
        let Some(held_out) = &self.held_out else { return Ok(None) };
        let per_batch = (self.recipe.train.sequence_length * self.recipe.train.batch_size) as u64;
        let score = eval::score(&mut self.trainer.model, &self.cpu, held_out, per_batch, tokens, of)?;
        if !score.loss().is_finite() {
            return Err(self.trainer.diverged("held-out loss"));
        }
        Ok(Some(score))
    }

    fn evaluate(&mut self, step: u64, tokens: u64) -> Result<Option<Score>> {
        let score = self.score_held_out(tokens)?;
        if let Some(score) = &score {
            let evaluation = metrics::Evaluation {
                step,
                tokens: step * self.recipe.tokens_per_step(),
                loss: score.loss(),
                bits_per_byte: score.bits_per_byte(),
            };
            (self.on_event)(Event::Evaluation(&evaluation));
            self.metrics.append(&Record::Evaluation(evaluation))?;
        }
        Ok(score)
    }

    fn sample(&mut self, step: u64) -> Result<()> {
        let (recipe, tokenizer) = (&self.recipe, &self.prepared.tokenizer);
        let texts =
            eval::samples(&mut self.trainer.model, &self.cpu, tokenizer, &recipe.sample, recipe.run.seed);
        let texts = match texts {
            Ok(texts) => texts,
            // a prompt that does not fit is no reason to lose a run
            Err(error) => {
                (self.on_event)(Event::Warning { text: &format!("no sample: {error}") });
                return Ok(());
            }
        };
        for (prompt, text) in recipe.sample.prompts.iter().zip(texts) {
            let sample = SampleText { step, prompt: prompt.clone(), text };
            (self.on_event)(Event::Sample(&sample));
            self.metrics.append(&Record::Sample(sample))?;
        }
        Ok(())
    }

    fn save(&mut self, step: u64) -> Result<()> {
        let tokens = step * self.recipe.tokens_per_step();
        let data = fingerprint(&self.prepared);
        let state = State::new(step, tokens, self.elapsed_s(), self.recipe.run.seed, data);
        let tokenizer = &self.prepared.tokenizer;
        let path = self.checkpoints.save(&self.cpu, &self.trainer, tokenizer, None, &state)?;
        (self.on_event)(Event::Checkpoint { step, path });
        Ok(())
    }

    /// The model's folder and the report.
    fn finish(&mut self) -> Result<Finished> {
        let model = self.folder.model();
        checkpoint::save_model(&model, &self.trainer.model, &self.prepared.tokenizer, None)?;
        self.checkpoints.settle()?;
        let score = match self.score {
            Some(score) => Some(score),
            // resumed after the last step: the same figure again
            None => self.score_held_out(self.final_eval_tokens())?,
        };
        let bytes = score.map_or(0, |score| score.bytes);
        // where only a part of every document is predicted, compressing the whole is another task
        let whole = self.prepared.validation.as_ref().is_some_and(|shards| !shards.has_context());
        let zstd = match &self.prepared.validation_text {
            Some(path) if bytes > 0 && whole => {
                // the evaluation read the stream from its start, so this is the text that it read; whole documents it read
                // a few windows sooner or later
                let text = fs::File::open(path).map_err(TrainError::io("read", path))?.take(bytes);
                Some(compress::zstd_bits_per_byte(text).map_err(TrainError::io("compress", path))?)
            }
            _ => None,
        };
        let records = metrics::read(&self.folder.metrics())?;
        let counts = spec::parameters(&self.recipe.config);
        let report = Report {
            name: self.recipe.run.name.clone(),
            parameters: counts.total + counts.mtp,
            active_parameters: counts.active,
            held_out_bytes: bytes,
            yardsticks: zstd
                .map(|bits_per_byte| Yardstick { name: "zstd at level 22".to_owned(), bits_per_byte })
                .into_iter()
                .collect(),
            facts: self.facts(&records),
            records,
            baseline: self.recipe.baseline.as_deref().map(baseline).transpose()?,
        };
        let report = report.write(self.folder.path())?;
        Ok(Finished {
            model,
            report,
            bits_per_byte: score.map(|score| score.bits_per_byte()),
            zstd_bits_per_byte: zstd,
        })
    }

    fn facts(&self, records: &[Record]) -> Vec<(String, String)> {
        let steps = || {
            records.iter().filter_map(|record| match record {
                Record::Step(step) => Some(step),
                Record::Evaluation(_) | Record::Sample(_) => None,
            })
        };
        let stats = self.prepared.stats;
        let mut facts = vec![
            ("text".to_owned(), format!("{} documents, {:.1} MB", stats.documents, stats.bytes as f64 / 1e6)),
            ("vocabulary".to_owned(), self.prepared.tokenizer.vocab_size().to_string()),
            (
                "machine".to_owned(),
                format!(
                    "{} threads, {}, {:.0} GFLOP/s in a large {} product",
                    self.cpu.threads(),
                    self.cpu.level().name(),
                    self.gemm_peak_gflops,
                    self.recipe.precision.name()
                ),
            ),
        ];
        let shares: Vec<f64> = steps().filter_map(|step| step.gemm_share).collect();
        if !shares.is_empty() {
            let share = format!("{:.0} % (median step)", 100.0 * median(&shares));
            facts.push(("share of that rate in training".to_owned(), share));
        }
        if let Some(balance) = steps().next_back().and_then(|step| step.balance.as_ref()) {
            let text = format!(
                "{} dead, busiest {:.2} times the mean",
                balance.dead_experts,
                1.0 + balance.max_violation
            );
            facts.push(("experts in the last step".to_owned(), text));
        }
        facts
    }
}
