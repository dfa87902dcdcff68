#!/usr/bin/env python3
"""What PyTorch and transformers reach on Minke's three training shapes, on CPU.

    python scripts/bench_torch.py [--shapes A,B,C] [--threads 2] [--steps 7]
        [--modes eager-f32,eager-bf16,compile-f32,compile-bf16]
        [--experts grouped_mm] [--timeout 200] [--json FILE]

The shapes are those of `recipes/bench-a.toml`, `bench-b.toml`, `bench-c.toml`:
random tokens, no MTP, forward + backward + AdamW, nothing left out and nothing
added. Each configuration runs in a process of its own, so peak RSS is its own.

bf16 is run in two ways, the whole model and its optimizer state in bf16
(`pure`, no f32 masters) and autocast over f32 weights (`autocast`), and the
faster one stands; compile-bf16 runs the way that was faster uncompiled. Experts go
through transformers' `grouped_mm`; whether its native kernel ran is checked
and reported, not assumed. Attention is PyTorch's fused kernel (sdpa), AdamW
is the fused one.

A step's time is the median after the warm-up (the first step apart, as
`first_step_s`: compiling happens there); `best_step_ms` is the fastest of
them. `others` is the share of the machine's processor time that other
processes took during the timed steps (largest of them): a figure with more
than a few per cent there is no measurement of PyTorch. A configuration that runs past
`--timeout` seconds stands with the steps that it finished (`timed_out`).
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time

V3 = {
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
SHAPES = {
    "A": {
        "family": "deepseek_v3",
        "batch": 16,
        "tokens": 256,
        "config": {
            **V3,
            "hidden_size": 192,
            "num_hidden_layers": 6,
            "intermediate_size": 512,
            "moe_intermediate_size": 96,
            "n_routed_experts": 16,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "kv_lora_rank": 64,
            "vocab_size": 4096,
            "max_position_embeddings": 256,
        },
    },
    "B": {
        "family": "deepseek_v3",
        "batch": 8,
        "tokens": 512,
        "config": {
            **V3,
            "hidden_size": 384,
            "num_hidden_layers": 8,
            "intermediate_size": 1024,
            "moe_intermediate_size": 192,
            "n_routed_experts": 32,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "kv_lora_rank": 128,
            "vocab_size": 8192,
            "max_position_embeddings": 512,
        },
    },
    "C": {
        "family": "llama",
        "batch": 8,
        "tokens": 256,
        "config": {
            "hidden_size": 288,
            "num_hidden_layers": 6,
            "intermediate_size": 768,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "vocab_size": 8192,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
    },
}
MODES = ("eager-f32", "eager-bf16", "compile-f32", "compile-bf16")

# --------------------------------------------------------------------------
# In the child
# --------------------------------------------------------------------------


def busy_s():
    """(processor seconds used on the whole machine, those used by this process), or Nones."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    except OSError:
        return None, None
    ticks = os.sysconf("SC_CLK_TCK")
    own = os.times()
    return (user + nice + system + irq + softirq) / ticks, own.user + own.system


def emit(**record):
    print(json.dumps(record), flush=True)


def child_gemm(threads):
    """PyTorch's own GEMM rate, 2048 x 2048 x 2048, GFLOP/s."""
    import torch

    torch.set_num_threads(threads)
    size = 2048
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn(size, size).to(dtype)
        w = torch.randn(size, size).to(dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - start)
        emit(gemm=name, gflops=2 * size**3 / statistics.median(times[1:]) / 1e9)


def count_grouped_mm(model, input_ids):
    """(native calls, fallback calls) of transformers' grouped matmul in one forward."""
    import torch
    from transformers.integrations import moe

    calls = {"native": 0, "fallback": 0}
    original = moe._grouped_mm

    def counted(input, weight, offs):
        calls["native" if moe._can_use_grouped_mm(input, weight, offs) else "fallback"] += 1
        return original(input, weight, offs=offs)

    moe._grouped_mm = counted
    with torch.no_grad():
        model(input_ids[:1, :32])
    moe._grouped_mm = original
    return calls["native"], calls["fallback"]


def child_train(shape, mode, variant, experts, threads, steps):
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    compiled, bf16 = mode.startswith("compile"), mode.endswith("bf16")
    pure = bf16 and variant == "pure"
    spec = SHAPES[shape]
    config = AutoConfig.for_model(spec["family"], **spec["config"])
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.bfloat16 if pure else torch.float32,
        attn_implementation="sdpa",
        **({"experts_implementation": experts} if spec["family"] == "deepseek_v3" else {}),
    )
    model.train()
    batches = torch.randint(0, config.vocab_size, (4, spec["batch"], spec["tokens"]))
    emit(parameters=sum(p.numel() for p in model.parameters()), torch=torch.__version__,
         transformers=transformers.__version__)
    if spec["family"] == "deepseek_v3":
        native, fallback = count_grouped_mm(model, batches[0])
        emit(experts=model.config._experts_implementation, grouped_mm_native=native, grouped_mm_fallback=fallback)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if compiled else model
    for step in range(steps):
        machine, own = busy_s()
        start = time.perf_counter()
        ids = batches[step % len(batches)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16 and not pure):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        others = None
        if machine is not None:
            machine_after, own_after = busy_s()
            spent = (machine_after - machine) - (own_after - own)
            others = max(0.0, spent / (seconds * os.cpu_count()))
        emit(step_s=seconds, others=others, loss=loss.item(), peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


# --------------------------------------------------------------------------
# In the parent
# --------------------------------------------------------------------------


def run_child(arguments, timeout):
    """Records that a child printed, and how it ended: None, "timeout" or its error."""
    command = [sys.executable, os.path.abspath(__file__), *arguments]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ended = None
    try:
        output, errors = child.communicate(timeout=timeout)
        if child.returncode != 0:
            ended = (errors.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the child's own group: it and its compile workers
        output, _ = child.communicate()
        ended = "timeout"
    records = []
    for line in output.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # a line cut short by the kill
    return records, ended


def measure(shape, mode, variant, options):
    steps = options.steps + 2
    records, ended = run_child(
        ["--child", "train", "--shapes", shape, "--modes", mode, "--variant", variant,
         "--experts", options.experts, "--threads", str(options.threads), "--steps", str(steps)],
        options.timeout,
    )
    result = {"shape": shape, "mode": mode, "variant": variant, "threads": options.threads, "ended": ended}
    times, losses, others = [], [], []
    for record in records:
        if "step_s" in record:
            times.append(record["step_s"])
            losses.append(record["loss"])
            others.append(record["others"])
            result["peak_rss_bytes"] = record["peak_rss_bytes"]
        else:
            result.update(record)
    if times:
        result["first_step_s"] = times[0]
        result["losses"] = losses
    # The second step may compile again (dynamic sizes); it is warm-up where more follow.
    timed = times[2:] if len(times) > 2 else times[1:]
    if timed:
        step_s = statistics.median(timed)
        result["timed_steps"] = len(timed)
        result["best_step_ms"] = min(timed) * 1e3
        result["others"] = max((share for share in others[-len(timed):] if share is not None), default=None)
        result["step_ms"] = step_s * 1e3
        result["tok_s"] = SHAPES[shape]["batch"] * SHAPES[shape]["tokens"] / step_s
    return result


def show(result):
    speed = f"{result['tok_s']:9.0f} {result['step_ms']:9.0f}" if "tok_s" in result else f"{'-':>9} {'-':>9}"
    rss = f"{result['peak_rss_bytes'] / 2**20:9.0f}" if "peak_rss_bytes" in result else f"{'-':>9}"
    first = f"{result['first_step_s']:8.1f}" if "first_step_s" in result else f"{'-':>8}"
    share = f"{result['others']:6.0%}" if result.get("others") is not None else f"{'-':>6}"
    grouped = ""
    if "grouped_mm_native" in result:
        grouped = f"{result['experts']} native {result['grouped_mm_native']} fallback {result['grouped_mm_fallback']}"
    print(
        f"{result['shape']:5} {result['mode']:12} {result['variant']:8} {speed} {first} {rss} {share}"
        f" {result.get('timed_steps', 0):5}  {grouped} {result['ended'] or ''}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="A,B,C")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7, help="timed steps, after two of warm-up")
    parser.add_argument("--experts", default="grouped_mm", help="grouped_mm, eager or batched_mm")
    parser.add_argument("--timeout", type=float, default=200.0, help="seconds for one configuration")
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--child", choices=("gemm", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes, modes = options.shapes.split(","), options.modes.split(",")
    if not set(shapes) <= set(SHAPES) or not set(modes) <= set(MODES):
        parser.error(f"shapes are {','.join(SHAPES)}, modes are {','.join(MODES)}")
    if options.child == "gemm":
        return child_gemm(options.threads)
    if options.child == "train":
        return child_train(shapes[0], modes[0], options.variant, options.experts, options.threads, options.steps)

    gemm = {record["gemm"]: record["gflops"] for record in
            run_child(["--child", "gemm", "--threads", str(options.threads)], options.timeout)[0]}
    print("torch GEMM 2048^3, GFLOP/s: " + ", ".join(f"{k} {v:.0f}" for k, v in gemm.items()), flush=True)
    print(f"{'shape':5} {'mode':12} {'variant':8} {'tok/s':>9} {'step ms':>9} {'first s':>8} {'RSS MiB':>9} {'others':>6} steps")
    results, best = [], {}
    for shape in shapes:
        faster = None
        for mode in modes:
            variants = [""]
            if mode.endswith("bf16"):
                variants = [faster] if faster else ["autocast", "pure"]
            tried = []
            for variant in variants:
                result = measure(shape, mode, variant, options)
                results.append(result)
                show(result)
                if "tok_s" in result:
                    tried.append(result)
            if tried:
                top = max(tried, key=lambda result: result["tok_s"])
                faster = top["variant"] or faster
                if shape not in best or top["tok_s"] > best[shape]["tok_s"]:
                    best[shape] = top
            if options.json:
                with open(options.json, "w") as file:
                    json.dump({"threads": options.threads, "gemm_gflops": gemm, "results": results, "best": best},
                              file, indent=1)
    for shape, result in best.items():
        print(f"best {shape}: {result['tok_s']:.0f} tok/s, {result['mode']} {result['variant']},"
              f" {result['peak_rss_bytes'] / 2**20:.0f} MiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
