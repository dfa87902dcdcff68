#!/usr/bin/env python3
"""Do llama.cpp, PyPI `gguf` and transformers read the GGUF files and folders that Minke writes, and mean the same?

    python scripts/check_gguf.py --minke target/release/minke --llama DIR
        [--random FAMILY,... --tokenizer FOLDER] [--gguf FILE] [--work DIR] [MODEL...]

DIR holds llama.cpp's `llama-completion` and `llama-tokenize`. For each MODEL (a
folder with a tokenizer, such as the `model/` of a run), and for a random small
model of each FAMILY (made with transformers, with the tokenizer of FOLDER):

  1. `minke export --to gguf --dtype f32`; the file is read by PyPI `gguf`, and
     each tensor's numbers are finite;
  2. llama.cpp and `minke generate` (from the folder and from the file) continue
     prompts greedily with the same text;
  3. `llama-tokenize` and the file's tokenizer cut texts into the same tokens,
     with control tokens recognised and as plain text;
  4. `minke export FILE.gguf --to hf --dtype f32`; transformers loads the folder
     and its logits are those of MODEL's own folder, within --tol.

For a FILE from elsewhere, with whatever tensors: 3; and of that file in f32 the
text of 2, and logits of Minke against transformers'.

Exit status: 0 all well, 1 a difference, 2 wrong use.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PROMPTS = ["fn main() {", "The 2 whales of 1851", "let x = "]
TEXTS = [
    "Hello world", " Hello  world ", "   ", "\n", "\n\n\n x\n", "\t\tif x == 1:\n\t\t\treturn 12345678\n", "it's they'll WE'VE don't",
    "3.14159 1,000,000 2026-11-26 007 1234567890", "naïve café Ünïcödé ñ Ångström", "漢字とかな 中文字符 한국어", "Привет, мир! Ελληνικά עברית العربية",
    "🐳 whales 👩‍👩‍👧 emoji", "a\r\nb\rc", "<|user|>hi<|assistant|><think>no</think>", "<bos><start_of_turn>user\nhi<end_of_turn>", "!!!??? --- ... ***",
    "fn main() { println!(\"{}\", x[0] << 2); } // done\n", "x" * 70, "word " * 40, "½ ² Ⅷ ٣٤ 百二十", "ﬁ ﬂ Å é (composed é)", "\u00a0nbsp\u2003em\u3000wide",
]


def run(*command, until=None, **more):
    # llama-completion may end before a thread of its own has written the last of the text, and then lacks its last line too
    for _ in range(20):
        done = subprocess.run([str(part) for part in command], capture_output=True, check=False, **more)
        if until is None or done.returncode != 0 or until in done.stderr:
            break
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{text}")
    return done.stdout


class Check:
    def __init__(self, args):
        self.args = args
        self.failed = 0

    def say(self, good, what):
        print(f"{'ok  ' if good else 'FAIL'} {what}", flush=True)
        self.failed += not good

    def llama(self, name, *rest, until=None):
        library = os.environ.get("LD_LIBRARY_PATH", "")
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{self.args.llama}:{library}"}
        return run(self.args.llama / name, *rest, until=until, env=environment, stdin=subprocess.DEVNULL)

    def minke(self, *rest):
        return run(self.args.minke, *rest)

    def texts(self, name, sources, file):
        """Greedy continuations by Minke from each source and by llama.cpp from the file."""
        n = self.args.tokens
        for prompt in PROMPTS:
            theirs = self.llama("llama-completion", "-m", file, "-p", prompt, "-n", n, "--temp", 0, "-no-cnv", "--no-display-prompt",
                                "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", 2, "--no-warmup", "-c", self.args.context, until=b"total time")
            theirs = theirs.decode(errors="replace").removesuffix("\n").replace(" [end of text]", "").rstrip("\n")
            for source in sources:
                command = ["generate", source, "-p", prompt, "-n", n, "--temperature", 0]
                ours = json.loads(self.minke(*command, "--json"))["text"].rstrip("\n")
                ours = ours.removeprefix(prompt)
                same = ours == theirs
                self.say(same, f"{name}: greedy text after {prompt!r}, {Path(source).suffix or 'folder'}" + ("" if same else f"\n  ours   {ours!r}\n  theirs {theirs!r}"))

    def tokens(self, name, file, folder):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        differ = 0
        for text in TEXTS:
            for special in [True, False]:
                tokenizer.encode_special_tokens = not special
                ours = tokenizer.encode(text, add_special_tokens=False).ids
                flags = [] if special else ["--no-parse-special"]
                with tempfile.NamedTemporaryFile("w", newline="") as prompt:
                    prompt.write(text)
                    prompt.flush()
                    out = self.llama("llama-tokenize", "-m", file, "-f", prompt.name, "--ids", "--no-bos", "--log-disable", *flags)
                theirs = json.loads(out)
                if ours != theirs:
                    differ += 1
                    print(f"  {text!r} special={special}\n    ours   {ours}\n    theirs {theirs}")
        self.say(differ == 0, f"{name}: {2 * len(TEXTS)} texts cut into the same tokens" + (f", {differ} are not" if differ else ""))

    def model(self, name, folder):
        work = self.args.work / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        file, back = work / "model.gguf", work / "back"
        print(self.minke("export", folder, "--to", "gguf", "--dtype", "f32", "--out", file).decode().strip())
        reader = gguf.GGUFReader(file)
        finite = all(np.isfinite(np.asarray(tensor.data)).all() for tensor in reader.tensors if tensor.tensor_type.name == "F32")
        self.say(finite, f"{name}: PyPI gguf reads {len(reader.tensors)} tensors and {len(reader.fields)} keys")
        self.texts(name, [folder, file], file)
        self.minke("export", file, "--to", "hf", "--dtype", "f32", "--out", back)
        self.tokens(name, file, back)
        logits = []
        ids = torch.tensor([[1, 7, 19, 3, 42, 5, 99, 8, 77, 2, 31]])
        for place in [folder, back]:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
            if info["missing_keys"] or info["mismatched_keys"]:
                self.say(False, f"{name}: {place}: keys {info['missing_keys']} {info['mismatched_keys']}")
            with torch.no_grad():
                logits.append(model.eval()(ids).logits)
        far = (logits[0] - logits[1]).abs().max().item()
        self.say(far <= self.args.tol, f"{name}: logits of the folder and of the folder from the file: largest difference {far:.2e}")
        transformers.AutoTokenizer.from_pretrained(back)

    def file(self, file):
        """Blocks are multiplied in another arithmetic by each program, so texts are compared in f32."""
        back, whole = self.args.work / "elsewhere", self.args.work / "elsewhere.gguf"
        shutil.rmtree(back, ignore_errors=True)
        self.minke("export", file, "--to", "hf", "--dtype", "f32", "--out", back)
        self.tokens(file.name, file, back)
        self.minke("export", file, "--to", "gguf", "--dtype", "f32", "--out", whole, "--force")
        self.tokens(f"{file.name}, written again", whole, back)
        self.texts(file.name, [whole, back], whole)
        sequence = Tokenizer.from_file(str(back / "tokenizer.json")).encode(PROMPTS[1] + " " + TEXTS[6]).ids
        tokens, logits = self.args.work / "tokens.json", self.args.work / "logits.safetensors"
        tokens.write_text(json.dumps({"sequences": [sequence]}))
        self.minke("score", whole, "--tokens", tokens, "--logits", logits)
        ours = safetensors.torch.load_file(logits)["logits.0"]
        model = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            theirs = model.eval()(torch.tensor([sequence])).logits[0]
        far = (ours - theirs).abs().max().item()
        self.say(far <= 50 * self.args.tol, f"{file.name}: logits of Minke and of transformers: largest difference {far:.2e}")


def random_model(family, tokenizer, work):
    """A small model with random weights of a family of transformers."""
    shape = dict(vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2,
                 tie_word_embeddings=False, initializer_range=0.15)
    latent = dict(q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, n_group=2, topk_group=1,
                  num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1, num_key_value_heads=4, head_dim=16)
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0, rope_theta=10000.0)
    families = {
        "llama": (transformers.LlamaConfig, shape),
        "llama3": (transformers.LlamaConfig, shape | dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0,
                   low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192))),
        "mistral": (transformers.MistralConfig, shape | dict(sliding_window=None)),
        "qwen2": (transformers.Qwen2Config, {k: v for k, v in shape.items() if k != "head_dim"}),
        "qwen3": (transformers.Qwen3Config, shape),
        "qwen3_yarn": (transformers.Qwen3Config, shape | dict(rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128))),
        "qwen3_moe": (transformers.Qwen3MoeConfig, shape | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)),
        "gemma2": (transformers.Gemma2Config, shape | dict(query_pre_attn_scalar=32, sliding_window=16, tie_word_embeddings=True)),
        "gemma3": (transformers.Gemma3TextConfig, shape | dict(query_pre_attn_scalar=32, sliding_window=16, tie_word_embeddings=True, num_hidden_layers=7)),
        "deepseek_v3": (transformers.DeepseekV3Config, shape | latent),
        "deepseek_v3_yarn": (transformers.DeepseekV3Config, shape | latent | dict(rope_parameters=yarn)),
        "deepseek_v2": (transformers.DeepseekV2Config, shape | latent | dict(n_group=1, q_lora_rank=None, topk_method="greedy", norm_topk_prob=False, head_dim=16)),
    }
    if family not in families:
        raise ValueError(f"unknown family; there are {', '.join(families)}")
    kind, settings = families[family]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.data = torch.randn_like(buffer) * 0.05
    folder = work / f"random-{family}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minke", type=Path, required=True)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--random", type=lambda text: text.split(","), default=[])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "minke-gguf")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("models", type=Path, nargs="*")
    args = parser.parse_args()
    if args.random and not args.tokenizer:
        parser.error("--random needs --tokenizer")
    args.work.mkdir(parents=True, exist_ok=True)
    check = Check(args)

    def guarded(what, work):
        try:
            work()
        except Exception as error:  # noqa: BLE001: one model's failure must not hide the others
            check.say(False, f"{what}: {error}")

    for family in args.random:
        def one(family=family):
            folder = random_model(family, Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")), args.work)
            for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]:
                if (args.tokenizer / name).is_file():
                    shutil.copy(args.tokenizer / name, folder / name)
            check.model(family, folder)
        guarded(family, one)
    for model in args.models:
        guarded(model, lambda model=model: check.model(model.resolve().parent.name + "-" + model.name, model))
    if args.gguf:
        guarded(args.gguf, lambda: check.file(args.gguf))
    print(f"{check.failed} failed")
    sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    main()
