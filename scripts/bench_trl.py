#!/usr/bin/env python3
# Made with torch 2.15.0, transformers 5.23.0, trl 1.16.0 (requirements.txt).
"""What TRL's GRPOTrainer reaches on shape A of the training benchmark, on CPU.

    python scripts/bench_trl.py [--modes f32,bf16,...] [--threads 2] [--steps 3] [--warm-up 2]
        [--others 1] [--timeout 200] [--json FILE]

One step is 16 prompts of 6 tokens, 8 answers each of exactly 48 new tokens (the end token is kept from being sampled),
a reward that is a function of the token ids (the share of even ones: it differs within every group), one update with
AdamW. The model is that of `recipes/bench-a.toml`, as in `bench_torch.py`: random weights, sdpa, `grouped_mm` experts,
fused AdamW. The trainer is TRL's own: generation is transformers' `generate` with its KV cache, no reference (beta 0),
no activation checkpointing. All 128 answers are one micro-batch unless the mode says otherwise.

Modes, each in a process of its own:

    f32            f32 throughout
    bf16           TRL's `bf16`: f32 weights, autocast in training
    pure-bf16      the model, its gradients and AdamW's state in bf16
    decode-f32     f32, decoding with the static KV cache and a compiled forward pass (TRL leaves this out: set after it)
    compile-f32    f32 with the model compiled in training (`torch_compile`), decoding as in f32
    both-f32       f32, both of them compiled
    decode-bf16    as decode-f32, with autocast in training
    both-bf16      as both-f32, with autocast in training
    micro-f32      f32 in micro-batches of 32

A step's time goes from one update's end to the next's; `generation_s` is the time in `generate`, `train_s` that in
`training_step`'s forward and backward and in the optimizer, `other_s` the rest (decoding, rewards, advantages, logs).
Medians over the steps after the warm-up; `others` is the largest share of the machine that other processes took in
one of them. With `--others 0.1` steps in which they took more are not counted, and a mode goes on until it has its
steps or runs out of time: for a machine that is not one's own. A mode that fails or takes longer than `--timeout` stands with what it
finished.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from bench_torch import SHAPES, busy_s, emit

MODES = ("f32", "bf16", "pure-bf16", "decode-f32", "compile-f32", "both-f32", "decode-bf16", "both-bf16", "micro-f32")
PROMPTS, ANSWERS, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 6, 48


def tokenizer(vocabulary):
    """Words `t0`, `t1`, ...: a prompt of n words has n tokens."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t1"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0", padding_side="left")


def even_share(completion_ids, **_):
    return [sum(1 for token in ids if token % 2 == 0) / len(ids) for ids in completion_ids]


def child(mode, threads, warm_up, steps, most_others):
    import random

    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    spec = SHAPES["A"]
    config = AutoConfig.for_model(spec["family"], **spec["config"], bos_token_id=None, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.bfloat16 if mode == "pure-bf16" else torch.float32,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    marks = {"generation": 0.0, "forward_backward": 0.0, "optimizer": 0.0, "lengths": []}

    class Timed(trl.GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate_single_turn(*args, **kwargs)
            marks["generation"] += time.perf_counter() - start
            marks["lengths"] += [len(ids) for ids in out[0]]
            return out

        def _prepare_inputs(self, batch):
            start = time.perf_counter()
            out = super()._prepare_inputs(batch)
            marks["prepare"] = marks.get("prepare", 0.0) + time.perf_counter() - start
            return out

        def training_step(self, *args, **kwargs):
            start, before = time.perf_counter(), marks.get("prepare", 0.0)
            out = super().training_step(*args, **kwargs)
            prepared = marks.get("prepare", 0.0) - before
            marks["forward_backward"] += time.perf_counter() - start - prepared
            return out

    class Clock(TrainerCallback):
        since, machine, own, counted = None, None, None, 0

        def start(self):
            marks.update(generation=0.0, forward_backward=0.0, optimizer=0.0, lengths=[])
            (self.machine, self.own), self.since = busy_s(), time.perf_counter()

        def on_step_begin(self, *args, **kwargs):
            if self.since is None:  # later steps begin where the one before ended
                self.start()

        def on_pre_optimizer_step(self, *args, **kwargs):
            marks["before_optimizer"] = time.perf_counter()

        def on_optimizer_step(self, *args, **kwargs):
            marks["optimizer"] += time.perf_counter() - marks["before_optimizer"]

        def on_step_end(self, args, state, control, **kwargs):
            total = time.perf_counter() - self.since
            assert len(marks["lengths"]) == PROMPTS * ANSWERS and set(marks["lengths"]) == {NEW_TOKENS}
            train = marks["forward_backward"] + marks["optimizer"]
            others = None
            if self.machine is not None:
                machine, own = busy_s()
                others = max(0.0, (machine - self.machine - (own - self.own)) / (total * os.cpu_count()))
            counts = state.global_step > warm_up and (others or 0.0) <= most_others
            self.counted += counts
            control.should_training_stop = self.counted >= steps
            emit(counts=counts, step_s=total, generation_s=marks["generation"], train_s=train,
                 other_s=total - marks["generation"] - train, others=others,
                 peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            self.start()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "frac_reward_zero_std" in logs:
                emit(groups_without_signal=logs["frac_reward_zero_std"], grad_norm=float(logs.get("grad_norm", 0.0)))

    decode = mode.startswith(("decode", "both"))
    answers = PROMPTS * ANSWERS
    micro = answers // 4 if mode.startswith("micro") else answers
    rng = random.Random(0)
    prompts = [" ".join(f"t{rng.randrange(1, config.vocab_size)}" for _ in range(PROMPT_TOKENS)) for _ in range(512)]
    generation = {"min_new_tokens": NEW_TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=model,
            reward_funcs=even_share,
            args=trl.GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=mode in ("bf16", "decode-bf16", "both-bf16"),
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1,
                max_steps=1000,  # the clock stops it
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=answers // micro,
                num_generations=ANSWERS,
                max_completion_length=NEW_TOKENS,
                pad_to_multiple_of=None,
                temperature=1.0,
                beta=0.0,
                loss_type="grpo",
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                weight_decay=0.1,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                torch_compile=mode.startswith(("compile", "both")),
                cache_implementation="static" if decode else None,
                generation_kwargs=generation,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer(config.vocab_size),
            callbacks=[Clock()],
        )
        if decode:
            # TRL turns compiling off whatever the cache, and transformers leaves it to accelerators
            trainer.generation_config.disable_compile = False
            trainer.generation_config.compile_config = transformers.CompileConfig()
            trainer.generation_config.compile_config._compile_all_devices = True
        emit(parameters=sum(p.numel() for p in model.parameters()), torch=torch.__version__,
             transformers=transformers.__version__, trl=trl.__version__)
        trainer.train()


def measure(mode, options):
    command = [sys.executable, os.path.abspath(__file__), "--child", mode, "--threads", str(options.threads),
               "--steps", str(options.steps), "--warm-up", str(options.warm_up), "--others", str(options.others)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    ended = None
    try:
        output, errors = process.communicate(timeout=options.timeout)
        if process.returncode != 0:
            ended = (errors.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the child's own group: it and its compile workers
        output, _ = process.communicate()
        ended = "timeout"
    result, records = {"mode": mode, "threads": options.threads, "ended": ended}, []
    for line in output.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the trainer's own lines, or one cut short by the kill
        if not isinstance(record, dict):
            continue
        if "step_s" in record:
            records.append(record)
        else:
            result.update(record)
    timed = [record for record in records if record["counts"]]
    if timed:
        result["steps"] = records
        result |= {key: statistics.median(record[key] for record in timed)
                   for key in ("step_s", "generation_s", "train_s", "other_s")}
        result["generation_tok_s"] = PROMPTS * ANSWERS * NEW_TOKENS / result["generation_s"]
        result["best_step_s"] = min(record["step_s"] for record in timed)
        result["others"] = max((record["others"] for record in timed if record["others"] is not None), default=None)
        result["peak_rss_bytes"] = timed[-1]["peak_rss_bytes"]
        result["timed_steps"] = len(timed)
    return result


def show(result):
    if "step_s" not in result:
        print(f"{result['mode']:12} {result['ended'] or 'no step that counts'}", flush=True)
        return
    others = f"{result['others']:6.0%}" if result["others"] is not None else f"{'-':>6}"
    print(f"{result['mode']:12} {result['step_s']:7.2f} {result['best_step_s']:7.2f} {result['generation_s']:10.2f}"
          f" {result['generation_tok_s']:8.0f} {result['train_s']:8.2f} {result['other_s']:8.2f}"
          f" {result['peak_rss_bytes'] / 2**20:8.0f} {others} {result['timed_steps']:6}  {result['ended'] or ''}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="f32,bf16,pure-bf16,decode-f32,compile-f32,both-f32,decode-bf16,both-bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=2, help="steps, the first compiles")
    parser.add_argument("--others", type=float, default=1.0, help="most of the machine that others may take in a step")
    parser.add_argument("--timeout", type=float, default=200.0, help="seconds for one mode")
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.threads, options.warm_up, options.steps, options.others)
    modes = options.modes.split(",")
    if not set(modes) <= set(MODES):
        parser.error(f"modes are {','.join(MODES)}")
    print(f"{'mode':12} {'step s':>7} {'best s':>7} {'generation':>10} {'tok/s':>8} {'train s':>8} {'other s':>8}"
          f" {'RSS MiB':>8} {'others':>6} {'steps':>6}", flush=True)
    results = []
    for mode in modes:
        results.append(measure(mode, options))
        show(results[-1])
    finished = [result for result in results if "step_s" in result]
    best = min(finished, key=lambda result: result["step_s"], default=None)
    if best:
        print(f"best: {best['mode']}, {best['step_s']:.2f} s a step, {best['generation_tok_s']:.0f} tok/s in generation")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"prompts": PROMPTS, "answers": ANSWERS, "new_tokens": NEW_TOKENS, "results": results, "best": best},
                      file, indent=1)
    return 0 if best else 1


if __name__ == "__main__":
    sys.exit(main())
