//! Arguments, as a person types them.

mod files;
mod infer;
mod shared;
mod tasks;
mod train;

use clap::{Parser, Subcommand};

pub use files::{Export, ExportDtype, ExportTo, Inspect, Quantize, QuantizeTo, ScaleFormat};
pub use infer::{BenchInfer, Chat, Generate, Score, Serve, SteeringArgs};
pub use shared::{Drafts, Half, KeptAs, ModelArgs, SamplingArgs, SpeculationArgs, Threads, Word};
pub use tasks::{Eval, GymList, GymShow, GymWrite, LineFormat, PER_LEVEL, TaskForm};
pub use train::{BenchGrpo, BenchTrain, Make, Train};

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
