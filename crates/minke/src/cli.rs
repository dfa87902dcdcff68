//! Arguments, as a person types them.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Makes small reasoning language models and runs them, on the machine that you have.
#[derive(Debug, Parser)]
#[command(
    name = "minke",
    version,
    max_term_width = 100,
    after_help = "Examples:\n  \
        minke pretrain recipes/quickstart.toml   train a model from scratch\n  \
        minke chat runs/quickstart               talk to what it made\n\n\
        A MODEL is a Hugging Face folder, a run folder, a .gguf file, or OWNER/NAME of a model in the \
        local hub cache."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model from scratch as a recipe says
    #[command(after_help = "Examples:\n  \
        minke pretrain recipes/quickstart.toml\n  \
        minke pretrain recipes/quickstart.toml --set train.tokens=2M --out runs/short\n  \
        minke pretrain recipes/quickstart.toml --resume\n\n\
        Ctrl-C stops after the step that runs, with a checkpoint; --resume then continues, bit for bit.")]
    Pretrain(Train),
    /// Make a model in stages, as one recipe says
    #[command(after_help = "Examples:\n  \
        minke make recipes/tiny-r1.toml\n  \
        minke make recipes/tiny-r1.toml --set rl.train.steps=50 --out runs/short\n  \
        minke make recipes/tiny-r1.toml --resume\n  \
        minke make recipes/tiny-r1.toml --from rl --set rl.objective.algorithm=dapo\n\n\
        A stage is a [[stage]] with a name, a kind (worked, pretrain, sft, grpo, sample, distill, eval) and \
        the recipe of that kind, where \"stage:NAME\" is the folder of an earlier stage, or of one in \
        the folder run.after, which another recipe made. Ctrl-C stops with a checkpoint; --resume goes on. \
        --from and --only remove what the stages had made before.")]
    Make(Make),
    /// Talk to a model in the terminal
    #[command(after_help = "Examples:\n  \
        minke chat runs/quickstart\n  \
        minke chat runs/tiny-r1 --think 200 --verbose\n  \
        minke chat Qwen/Qwen3-0.6B --system 'Answer in one sentence.' --temperature 0.6\n  \
        minke chat runs/tiny-r1 --load talk.json\n  \
        minke chat Qwen/Qwen3-0.6B --cache int8\n  \
        minke chat Qwen/Qwen3-8B --draft-model Qwen/Qwen3-0.6B\n  \
        echo 'fn main() {' | minke chat runs/quickstart\n\n\
        While talking: /help lists the commands, Ctrl-C stops the answer, Ctrl-D leaves. What is typed at a \
        terminal is remembered in ~/.local/share/minke/chat_history (or in $XDG_DATA_HOME). \
        Over a pipe the first turn or command that fails ends it. \
        A model without a chat template is a base model: it continues what is typed.")]
    Chat(Chat),
    /// Continue a text, or answer a question
    #[command(after_help = "Examples:\n  \
        minke generate runs/tiny-r1 --chat -p 'What is 56365+18356?'\n  \
        minke generate Qwen/Qwen3-0.6B --system 'Answer in one word.' --think off -p 'A whale is a...'\n  \
        minke generate runs/quickstart -p 'fn main() {' -n 100\n  \
        minke generate runs/quickstart -p 'use std::' --temperature 0 --stop ';' --json\n  \
        minke generate runs/quickstart -p - --cache int8 < notes.md\n\n\
        Of an answer with a thought --json has `thought` and `answer` beside the whole `text`; a schema or \
        grammar is kept by the answer. The same arguments give the same text, at any number of threads.")]
    Generate(Generate),
    /// Answer requests over HTTP, as OpenAI's API does
    #[command(after_help = "Examples:\n  \
        minke serve runs/tiny-r1\n  \
        minke serve runs/tiny-r1 --addr 127.0.0.1:9000 --parallel 8 --cache-gib 4 --cache int8\n  \
        curl -s localhost:8080/v1/chat/completions -H 'content-type: application/json' \\\n    \
        -d '{\"messages\": [{\"role\": \"user\", \"content\": \"2+3=?\"}]}'\n\n\
        Any client of that API works, with the base URL http://localhost:8080/v1 and any key. \
        /v1/chat/completions, /v1/completions, /v1/models and /health are served. There is no password: \
        whoever reaches the address may ask, web pages only from an --allow-origin. Each request that is over \
        is a line on standard error. Ctrl-C lets answers end, a second one does not.")]
    Serve(Serve),
    /// Give the log-probability of each token of given sequences
    #[command(after_help = "Examples:\n  \
        minke score runs/quickstart --tokens ids.json --json\n  \
        minke score runs/quickstart --tokens ids.json --logits logits.safetensors\n\n\
        The file holds {\"sequences\": [[1, 2, 3], [4, 5]]}. With --logits, row i of \
        `logits.N` is what the model says after token i of sequence N.")]
    Score(Score),
    /// Show the parameters, memory, arithmetic and time of a model or recipe
    #[command(after_help = "Examples:\n  \
        minke inspect runs/quickstart\n  \
        minke inspect recipes/quickstart.toml --set model.depth=8\n  \
        minke inspect recipes/quickstart.toml --resolved\n  \
        minke inspect deepseek-ai/DeepSeek-V2-Lite --json\n\n\
        Of a pretrain recipe it also says what training will need here: memory by formula, and time from measurements \
        of some seconds. A recipe that does not fit into memory ends with exit code 2.")]
    Inspect(Inspect),
    /// Teach a model to answer as examples do
    #[command(after_help = "Examples:\n  \
        minke sft cold-start.toml\n  \
        minke sft cold-start.toml --set train.epochs=3 --out runs/longer\n  \
        minke sft cold-start.toml --resume\n\n\
        A recipe names a model, a chat template if the model has none, and JSONL files:\n  \
        [model]\n  path = \"runs/base\"\n  template = \"minke\"\n  [data]\n  \
        sources = [{ path = \"examples.jsonl\" }]\n\n\
        A line holds `messages`, or `prompt` and `completion` (or `answer`, with a `thought`).")]
    Sft(Train),
    /// Let a model learn from the outcome of its own answers
    #[command(after_help = "Examples:\n  \
        minke grpo rl.toml\n  \
        minke grpo rl.toml --set objective.algorithm=dapo --out runs/rl-dapo\n  \
        minke grpo rl.toml --resume\n\n\
        A recipe names a model and tasks that can be checked:\n  \
        [model]\n  path = \"runs/cold-start\"\n  [tasks]\n  suite = \"core:1-3\"    # or a .jsonl file\n\n\
        Objectives: grpo, dr_grpo, dapo, gspo, cispo.")]
    Grpo(Train),
    /// Let a model answer tasks and keep the right answers to learn from
    #[command(after_help = "Examples:\n  \
        minke sample lessons.toml\n  \
        minke sample lessons.toml --set keep.which=all --out runs/lessons\n  \
        minke sample lessons.toml --resume\n\n\
        A recipe names a teacher, tasks of the training half, and which right answers are kept:\n  \
        [model]\n  path = \"runs/rl\"\n  [tasks]\n  suite = \"core:1-3\"\n  [keep]\n  which = \"shortest\"\n\n\
        answers.jsonl in the run's folder is what minke sft learns from.")]
    Sample(Train),
    /// Let a student learn from a teacher
    #[command(after_help = "Examples:\n  \
        minke distill student.toml\n  \
        minke distill student.toml --set distill.divergence=reverse --out runs/reverse\n  \
        minke distill student.toml --resume\n\n\
        A recipe names a teacher, a student (or the sizes of a fresh one), and how it learns:\n  \
        [teacher]\n  path = \"runs/rl\"\n  [student.model]             # or [student] with a path\n  \
        family = \"llama\"\n  depth = 4\n  [distill]\n  mode = \"logits\"\n  [data]\n  \
        sources = [{ path = \"runs/lessons/answers.jsonl\" }]\n\n\
        sequences learns the teacher's answers, logits what it takes to be likely at each place of them, \
        on_policy (with [tasks] and [rollout] as in grpo) what it says of the student's own answers. \
        Both must have the same tokenizer; their architectures may differ.")]
    Distill(Train),
    /// Ask a model tasks and count the right answers
    #[command(after_help = "Examples:\n  \
        minke eval runs/tiny-r1 core\n  \
        minke eval runs/tiny-r1 addition:1-3 sort --samples 8 --k 1,4,8\n  \
        minke eval runs/tiny-r1 my-tasks.jsonl --out answers.jsonl --resume --json\n  \
        minke eval runs/quickstart notes.md\n  \
        minke eval runs/quickstart notes.md --against runs/quickstart --cache int8\n\n\
        A SUITE is gym, core, a family (minke gym list), a family with levels such as chain:2 or sort:1-4, \
        a .jsonl file of tasks, or a text file, whose perplexity is measured. \
        A task is {\"prompt\": \"1/2+1/4=?\", \"answer\": \"3/4\"}, with a \"verifier\" if equality is not enough: \
        exact, number, choice, regex, json, program. Programs that tasks name are run on this machine.")]
    Eval(Eval),
    /// Write a model for other programs: a folder in another dtype, or a GGUF file
    #[command(after_help = "Examples:\n  \
        minke export runs/quickstart --to hf --out quickstart-bf16\n  \
        minke export runs/quickstart --to hf --dtype fp8 --out quickstart-fp8\n  \
        minke export deepseek-ai/DeepSeek-V3 --to hf --dtype bf16 --out v3-bf16 --json\n  \
        minke export runs/quickstart --to gguf --out quickstart.gguf\n  \
        minke export model.gguf --to hf --out model\n\n\
        fp8 is the form in which DeepSeek publishes: projections as E4M3 codes with a scale for each square \
        of 128 by 128; embedding, head, norms and router in bf16. Codes that the model has already stay \
        as they are. Tokenizer, chat template and generation config are copied.\n\n\
        gguf is one file that llama.cpp and others read, with tokenizer and chat template; vectors and \
        routers are f32 in it. `minke quantize` writes smaller ones.")]
    Export(Export),
    /// Make a model smaller: weights of 4 to 8 bits
    #[command(after_help = "Examples:\n  \
        minke quantize runs/quickstart --to Q4_K_M --out quickstart-q4.gguf\n  \
        minke quantize Qwen/Qwen3-0.6B --to Q4_K_M --imatrix notes.md --out qwen3-q4.gguf\n  \
        minke quantize runs/quickstart --to FP8 --out quickstart-fp8\n\n\
        Q8_0 to Q4_0 write a GGUF file, which this program and others run as it is. The mixes called M store \
        values of attention and the way down of feed-forward blocks in half of the layers finer than the rest; \
        the head is finer in all of them; norms, biases and routers stay f32. FP8 writes a folder, as export \
        --dtype fp8 does. With --imatrix the model first reads a text, and errors weigh by what the columns of \
        each matrix, and of each expert's, have read: use some hundred kB of the kind that it will write.")]
    Quantize(Quantize),
    /// List, show and write problems that can be checked
    #[command(
        subcommand,
        after_help = "Examples:\n  \
        minke gym list\n  \
        minke gym show core\n  \
        minke gym write core --count 100k --out pretrain.jsonl"
    )]
    Gym(Gym),
    /// Measure speed, beside what this machine can do
    #[command(
        subcommand,
        after_help = "Examples:\n  \
        minke bench infer runs/quickstart\n  \
        minke bench train recipes/bench-a.toml\n  \
        minke bench grpo recipes/bench-a.toml"
    )]
    Bench(Bench),
}

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Reading prompts and writing answers
    #[command(after_help = "Examples:\n  \
        minke bench infer runs/quickstart\n  \
        minke bench infer recipes/bench-b.toml --prefill 256 --decode 64 --batch 8 --json\n  \
        minke bench infer runs/quickstart --prefill 2048 --cache int8\n\n\
        A recipe is measured with random weights.")]
    Infer(BenchInfer),
    /// Training steps
    #[command(after_help = "Examples:\n  \
        minke bench train recipes/bench-a.toml\n  \
        minke bench train recipes/bench-a.toml --steps 20 --threads 1 --json")]
    Train(BenchTrain),
    /// Steps of reinforcement learning: sampling, and learning from it
    #[command(after_help = "Examples:\n  \
        minke bench grpo recipes/bench-a.toml\n  \
        minke bench grpo recipes/bench-a.toml --prompts 32 --new-tokens 128 --json\n\n\
        The model and optimizer are the recipe's, with random weights; prompts are random tokens.")]
    Grpo(BenchGrpo),
}

/// What can be done with the problems.
#[derive(Debug, Subcommand)]
pub enum Gym {
    /// List the families of problems
    #[command(after_help = "Examples:\n  \
        minke gym list\n  \
        minke gym list --json")]
    List(GymList),
    /// Show problems with answers and worked thoughts
    #[command(after_help = "Examples:\n  \
        minke gym show core\n  \
        minke gym show chain:3 --count 5 --care brief --seed 7")]
    Show(GymShow),
    /// Write worked problems, or tasks, one JSON object a line
    #[command(after_help = "Examples:\n  \
        minke gym write core --count 100k --care mix --out pretrain.jsonl\n  \
        minke gym write core:1-2 --count 300 --care full=1,none=1 --format chat --out cold-start.jsonl\n  \
        minke gym write addition:1-3 --count 1000 --format task --split held-out --out tasks.jsonl")]
    Write(GymWrite),
}

/// How many threads.
#[derive(Debug, Clone, Copy, Args)]
pub struct Threads {
    /// Threads that compute; all cores when not given
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// The type that products run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Word {
    // no doc comments: they would stretch the help of every command
    F32,
    Bf16,
    Fp8,
}

/// Which model, and how it computes.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// A model folder, a run folder, a .gguf file, or OWNER/NAME in the local hub cache
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Compute in this type instead of the one that the weights are stored in: in f32 and bf16 weights in FP8 are expanded
    #[arg(long, value_enum)]
    pub precision: Option<Word>,
    #[command(flatten)]
    pub threads: Threads,
}

/// How tokens are chosen.
#[derive(Debug, Clone, Args)]
pub struct SamplingArgs {
    /// Most tokens to write [default: 128; to the end of the answer with a chat template]
    #[arg(short = 'n', long = "tokens", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub n: Option<u32>,
    /// Spread of the choice; 0 takes the likeliest token [default: what the model suggests, else 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Choose among the K likeliest tokens; 0 for all
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Choose among the likeliest tokens that reach this share together
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Choose among tokens with at least this share of the likeliest one's probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Choose among the most typical tokens that reach this share together
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub typical_p: Option<f32>,
    /// Divide the logits of tokens that came before, prompt included; 1 for none
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Take this off the logits of tokens that the answer has already
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Take this off the logits of the answer's tokens, as often as each came
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Names the random numbers
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// End where this text comes up; can be given several times
    #[arg(long, value_name = "STR")]
    pub stop: Vec<String>,
}

/// A recipe and changes to it.
#[derive(Debug, Clone, Args)]
pub struct RecipeArgs {
    /// A recipe file
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Change a value of the recipe, such as train.lr=0.001; can be given several times
    #[arg(long, value_name = "K=V")]
    pub set: Vec<String>,
}

/// `minke pretrain`, and the stages that come after it.
#[derive(Debug, Args)]
pub struct Train {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// The run's folder, instead of the recipe's run.out
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue a run from its last checkpoint
    #[arg(long)]
    pub resume: bool,
    /// Start even if it needs more memory than there is
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object per event
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// `minke make`.
#[derive(Debug, Args)]
pub struct Make {
    /// A recipe of stages
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Change a value of a stage, such as rl.train.steps=50, or of the whole, such as run.seed=1; can be given
    /// several times
    #[arg(long, value_name = "K=V")]
    pub set: Vec<String>,
    /// The folder, instead of the recipe's run.out
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Keep what is finished and go on with what was cut off
    #[arg(long, conflicts_with = "from")]
    pub resume: bool,
    /// Make this stage alone, again if it is there
    #[arg(long, value_name = "STAGE", conflicts_with = "from")]
    pub only: Option<String>,
    /// Make this stage and what follows again
    #[arg(long, value_name = "STAGE")]
    pub from: Option<String>,
    /// Start stages even if they need more memory than there is
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object per event
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// `minke chat`.
#[derive(Debug, Args)]
pub struct Chat {
    #[command(flatten)]
    pub model: ModelArgs,
    /// An instruction that holds for the whole conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Whether it thinks before it answers: on, off, auto, or at most N tokens [default: auto, as its template has it]
    #[arg(long, value_name = "HOW")]
    pub think: Option<String>,
    /// Go on with the conversation of a file that /save wrote
    #[arg(long, value_name = "FILE")]
    pub load: Option<PathBuf>,
    /// Show speed and how full the context is after each answer
    #[arg(long)]
    pub verbose: bool,
    /// Neither read nor write what was typed in earlier runs
    #[arg(long)]
    pub no_history: bool,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `minke serve`.
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Where to listen; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub addr: String,
    /// The model's name for clients [default: the last part of MODEL]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Let web pages of this origin ask, such as http://localhost:3000; can be given several times
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    pub allow_origin: Vec<String>,
    /// Answers that are written at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub parallel: u32,
    /// Requests that may wait for their turn
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub queue: u32,
    /// Memory of all caches of keys and values
    #[arg(long, value_name = "GIB", default_value_t = 2.0)]
    pub cache_gib: f64,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// Seconds from a request to the end of its answer
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub timeout: u64,
}

/// What a cache keeps.
#[derive(Debug, Clone, Copy, Args)]
pub struct CacheArgs {
    /// What is kept of texts: latents if the model's attention has them, else keys and values (auto); keys and values as the
    /// model computes them (model) or in another type (int8 takes half of bf16); or latents, in 8 bits too
    #[arg(long, value_name = "HOW", value_enum, default_value_t = KeptAs::Auto)]
    pub cache: KeptAs,
}

/// In which form it keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KeptAs {
    Auto,
    Model,
    F32,
    Bf16,
    Int8,
    Latent,
    LatentInt8,
}

/// What a request says about its tokens, beside how they are chosen.
#[derive(Debug, Clone, Args)]
pub struct SteeringArgs {
    /// Write at least so many tokens before one may end the text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_tokens: u32,
    /// Add X to the logit of a token id; -100 forbids it; can be given several times
    #[arg(long, value_name = "ID=X", value_parser = bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// End where this token id comes up; can be given several times
    #[arg(long, value_name = "ID")]
    pub stop_id: Vec<u32>,
    /// With --json, tell the N likeliest tokens at each place
    #[arg(long, value_name = "N", default_value_t = 0, requires = "json")]
    pub top_logprobs: u32,
    /// Close a thought that has come to N tokens, and let the model go on with its answer
    #[arg(long, value_name = "N")]
    pub think_budget: Option<u32>,
    /// Write JSON that satisfies the schema in this file
    #[arg(long, value_name = "FILE", group = "form")]
    pub json_schema: Option<PathBuf>,
    /// Write text that matches this regular expression as a whole
    #[arg(long, value_name = "REGEX", group = "form", allow_hyphen_values = true)]
    pub regex: Option<String>,
    /// Write text of the grammar in this file, in Lark's syntax
    #[arg(long, value_name = "FILE", group = "form")]
    pub grammar: Option<PathBuf>,
}

/// Where drafts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Drafts {
    // no doc comments: they would stretch the help of every command
    Auto,
    Off,
    Ngram,
    Mtp,
    Draft,
}

/// What is drafted ahead.
#[derive(Debug, Clone, Args)]
pub struct SpeculationArgs {
    /// Draft tokens ahead: from the text itself, the model's prediction module, or a draft model; the text is the same
    #[arg(long, value_name = "HOW", value_enum, default_value = "auto")]
    pub speculate: Drafts,
    /// A smaller model with the same tokenizer that drafts
    #[arg(long, value_name = "MODEL")]
    pub draft_model: Option<String>,
}

/// A scheme and a host, as browsers send them.
fn origin(text: &str) -> Result<String, String> {
    let host = text.split_once("://").map(|(_, host)| host);
    match host.filter(|host| !host.is_empty() && !host.contains(['/', '*', ' '])) {
        Some(_) => Ok(text.to_owned()),
        None => {
            Err("expected a scheme and a host, and its port if it has one: http://localhost:3000".to_owned())
        }
    }
}

/// `ID=X`.
fn bias(text: &str) -> Result<(u32, f32), String> {
    let pair = text.split_once('=').and_then(|(id, x)| Some((id.parse().ok()?, x.parse().ok()?)));
    pair.ok_or_else(|| "expected a token id, =, and a number, such as 42=-100".to_owned())
}

/// `minke generate`.
#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text to continue; - reads it from standard input
    #[arg(short = 'p', long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: String,
    /// Ask the text as a question, by the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Continue the text as it is, which is also done without this, with a note where the model has a chat template
    #[arg(long, conflicts_with_all = ["chat", "system", "think"])]
    pub raw: bool,
    /// An instruction before the question; asks by the chat template
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Whether it thinks before it answers: on, off, auto, or at most N tokens; asks by the chat template
    #[arg(long, value_name = "HOW")]
    pub think: Option<String>,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub steering: SteeringArgs,
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `minke score`.
#[derive(Debug, Args)]
pub struct Score {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A JSON file with token ids: {"sequences": [[1, 2, 3], [4, 5]]}
    #[arg(long, value_name = "FILE.json")]
    pub tokens: PathBuf,
    /// Write f32 tensors logits.0, logits.1, ... of shape [tokens, vocabulary]
    #[arg(long, value_name = "OUT.safetensors")]
    pub logits: Option<PathBuf>,
    /// Print one JSON object, with the log-probability of each token
    #[arg(long)]
    pub json: bool,
}

/// `minke inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// A model folder, a run folder, a .gguf file, OWNER/NAME in the local hub cache, or a pretrain recipe
    #[arg(value_name = "MODEL|RECIPE")]
    pub what: String,
    /// Change a value of the recipe; can be given several times
    #[arg(long, value_name = "K=V")]
    pub set: Vec<String>,
    /// Print the recipe with everything that follows from it, as a recipe, and nothing else
    #[arg(long, conflicts_with = "json")]
    pub resolved: bool,
    /// Length of the sequences that memory and arithmetic are stated for [default: the recipe's, or the model's]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1_073_741_824))]
    pub context: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// `minke bench infer`.
#[derive(Debug, Args)]
pub struct BenchInfer {
    /// A model folder, a run folder, a .gguf file, OWNER/NAME in the local hub cache, or a pretrain recipe
    #[arg(value_name = "MODEL|RECIPE")]
    pub model: String,
    /// Tokens of each prompt [default: 512, or what fits]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub prefill: Option<u32>,
    /// Tokens of each answer [default: 64, or what fits]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub decode: Option<u32>,
    /// Sequences at once
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub batch: u32,
    /// Draft tokens ahead, as minke generate does; random weights and prompts draft badly
    #[arg(long, value_name = "HOW", value_enum, default_value = "off")]
    pub speculate: Drafts,
    /// A smaller model with the same tokenizer that drafts, with --speculate draft or auto
    #[arg(long, value_name = "MODEL")]
    pub draft_model: Option<String>,
    /// Read this text instead of random tokens
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Measurements, of which the median counts
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Compute in this type instead of the one that the weights are stored in: in f32 and bf16 weights in FP8 are expanded
    #[arg(long, value_enum)]
    pub precision: Option<Word>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// `minke bench train`.
#[derive(Debug, Args)]
pub struct BenchTrain {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Steps to measure, after warming up
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub steps: u32,
    /// Start even if it needs more memory than there is
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// `minke bench grpo`.
#[derive(Debug, Args)]
pub struct BenchGrpo {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Prompts of a step
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub prompts: u32,
    /// Answers to each prompt
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub group: u32,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_tokens: u32,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 48, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub new_tokens: u32,
    /// Steps to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub steps: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// Which half of all problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Half {
    Train,
    HeldOut,
}

/// In which form tasks are put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TaskForm {
    Chat,
    Plain,
    Worked,
}

/// How lines of problems are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LineFormat {
    Text,
    Chat,
    Task,
}

/// A count of lines, which may end in k or M.
fn lines(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1000),
        None => text.strip_suffix('M').map_or((text, 1), |digits| (digits, 1_000_000)),
    };
    let count = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    count
        .filter(|n| (1..=1_000_000_000).contains(n))
        .ok_or_else(|| "expected a number such as 500 or 100k".to_owned())
}

/// Problems of each family and level that `minke eval` asks where the user says no number.
pub const PER_LEVEL: u32 = 25;

/// `minke eval`.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(flatten)]
    pub model: ModelArgs,
    /// What is asked; several are counted together and apart
    #[arg(value_name = "SUITE", required = true)]
    pub suites: Vec<String>,
    /// Answers to each task
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub samples: u32,
    /// Problems of each family and level
    #[arg(long, value_name = "N", default_value_t = PER_LEVEL, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub per_level: u32,
    /// The k of pass@k and majority@k, such as 1,4,8 [default: 1 and the number of samples]
    #[arg(long, value_name = "K", value_delimiter = ',')]
    pub k: Vec<u32>,
    /// Spread of the choice; 0 takes the likeliest token [default: 0 for one sample, else what the model
    /// suggests, else 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Most tokens of an answer, its thought included [default: 512]
    #[arg(short = 'n', long = "tokens", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub n: Option<u32>,
    /// Names the problems and the random numbers
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Begin answers with an empty thought
    #[arg(long)]
    pub no_think: bool,
    /// How tasks are put: by the chat template, as plain lines, or as worked problems are written
    /// [default: chat, or plain for a model without a template]
    #[arg(long, value_enum)]
    pub form: Option<TaskForm>,
    /// Which half of the gym's problems
    #[arg(long, value_enum, default_value = "held-out")]
    pub split: Half,
    /// Keep the answers in this file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Continue the file of --out: only what is not in it is asked
    #[arg(long)]
    pub resume: bool,
    /// Measure also, on the texts, how far the model is from this one: KL divergence and the same likeliest token
    #[arg(long, value_name = "MODEL")]
    pub against: Option<String>,
    /// How the model, and not the one of --against, keeps keys and values when they are compared
    #[arg(long, value_name = "HOW", value_enum, default_value_t = KeptAs::Model, requires = "against")]
    pub cache: KeptAs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// For which programs a folder is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportTo {
    Hf,
    Gguf,
}

/// What exported weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportDtype {
    Fp8,
    Bf16,
    F32,
    F16,
    #[value(name = "q8_0")]
    Q8_0,
}

/// What scales of FP8 may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScaleFormat {
    F32,
    Ue8m0,
}

/// `minke export`.
#[derive(Debug, Args)]
pub struct Export {
    /// A model folder, a run folder, a .gguf file, or OWNER/NAME in the local hub cache
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// The form: hf is a Hugging Face folder, gguf one file with weights and tokenizer
    #[arg(long, value_enum)]
    pub to: ExportTo,
    /// What the weights are stored in; fp8 is for hf, f16 and q8_0 are for gguf
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: ExportDtype,
    /// Scales of fp8: any f32, or powers of two as in DeepSeek-V3.1 [default: the model's own, else f32]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub scale_fmt: Option<ScaleFormat>,
    /// The new folder, or the new file, whose name ends in .gguf
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Replace a model that is there
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What weights become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizeTo {
    #[value(name = "Q8_0")]
    Q8_0,
    #[value(name = "Q6_K")]
    Q6K,
    #[value(name = "Q5_K_M")]
    Q5KM,
    #[value(name = "Q4_K_M")]
    Q4KM,
    #[value(name = "Q4_0")]
    Q4_0,
    #[value(name = "FP8")]
    Fp8,
}

/// `minke quantize`.
#[derive(Debug, Args)]
pub struct Quantize {
    /// A model folder, a run folder, a .gguf file, or OWNER/NAME in the local hub cache
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// What the weights become
    #[arg(long, value_enum, value_name = "FORMAT", ignore_case = true)]
    pub to: QuantizeTo,
    /// The new file, whose name ends in .gguf; for FP8 the new folder
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// A text that says which errors matter: columns that read much weigh more
    #[arg(long, value_name = "TEXT-FILE")]
    pub imatrix: Option<PathBuf>,
    /// Replace a model that is there
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// `minke gym list`.
#[derive(Debug, Args)]
pub struct GymList {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `minke gym show`.
#[derive(Debug, Args)]
pub struct GymShow {
    /// Families and levels, such as core or chain:2,sort:1-4
    #[arg(value_name = "SUITE")]
    pub suite: String,
    /// Problems of each family and level
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// Steps that thoughts take: full, brief, none, mix, or weights such as full=1,none=3
    #[arg(long, value_name = "CARE", default_value = "full")]
    pub care: String,
    /// Names the problems
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Which half of all problems
    #[arg(long, value_enum, default_value = "train")]
    pub split: Half,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `minke gym write`.
#[derive(Debug, Args)]
pub struct GymWrite {
    /// Families and levels, such as core or chain:2,sort:1-4
    #[arg(value_name = "SUITE")]
    pub suite: String,
    /// Lines, such as 500 or 100k; all families and levels come up equally often
    #[arg(long, value_name = "N", value_parser = lines)]
    pub count: u64,
    /// Steps that thoughts take: full, brief, none, mix, or weights such as full=1,none=3
    #[arg(long, value_name = "CARE", default_value = "full")]
    pub care: String,
    /// Prompts and completions to pretrain on, chats for SFT, or tasks to ask
    #[arg(long, value_enum, default_value = "text")]
    pub format: LineFormat,
    /// Names the problems
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Which half of all problems
    #[arg(long, value_enum, default_value = "train")]
    pub split: Half,
    /// The file
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Replace a file that is there
    #[arg(long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
