"""A GRPO step of Minke beside one of TRL's GRPOTrainer, in turn on the same machine: 16 prompts, 8 answers, 48 tokens.

    cargo build --release
    python scripts/bench_grpo_compare.py [--rounds 3] [--modes f32,decode-f32,both-f32] [--precisions bf16,f32]
        [--others 0.1] [--threads 2]

First `scripts/bench_trl.py` runs every mode once and the fastest one stands for TRL. Then each round runs
`minke bench grpo recipes/bench-a.toml` once for every precision and TRL's best mode once. Prints the medians over the
rounds, the ratios of TRL's step to Minke's, round by round and of the medians, and the largest share of the machine
that other processes took (a ratio with much of it says little). With `--others 0.1` a run of Minke in which they took
more is repeated, and steps of TRL in which they did are not counted. Needs scripts/requirements.txt.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from bench_torch import busy_s

ROOT = pathlib.Path(__file__).resolve().parent.parent
# How often Minke's run is tried while others take more of the machine than is allowed.
TRIES, PAUSE_S = 12, 10.0


def minke(precision, steps, threads, most_others):
    command = [pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release/minke", "bench", "grpo"]
    command += [ROOT / "recipes/bench-a.toml", "--set", f"precision={precision}"]
    command += ["--steps", str(steps), "--threads", str(threads), "--json"]
    for left in reversed(range(TRIES)):
        machine, own, start = busy_s()[0], sum(os.times()[:4]), time.perf_counter()
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        seconds = time.perf_counter() - start
        if machine is None:
            return result | {"others": None}
        spent = busy_s()[0] - machine - (sum(os.times()[:4]) - own)
        result["others"] = max(0.0, spent / (seconds * os.cpu_count()))
        if result["others"] <= most_others:
            return result
        if left:
            time.sleep(PAUSE_S)
    sys.exit(f"other processes took more than {most_others:.0%} of the machine in {TRIES} runs of Minke; see --others")


def trl(modes, steps, threads, timeout, most_others):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, ROOT / "scripts/bench_trl.py", "--modes", modes, "--steps", str(steps)]
        command += ["--threads", str(threads), "--others", str(most_others), "--timeout", str(timeout), "--json", out.name]
        if subprocess.run(command).returncode != 0:
            sys.exit("bench_trl.py measured nothing; see above, and --timeout")
        return json.loads(pathlib.Path(out.name).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="f32,decode-f32,both-f32", help="of bench_trl.py")
    parser.add_argument("--precisions", default="bf16,f32", help="of Minke")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--others", type=float, default=1.0, help="most of the machine that others may take")
    parser.add_argument("--timeout", type=float, default=200.0, help="seconds for one run of TRL")
    parser.add_argument("--json", help="write every figure to this file")
    args = parser.parse_args()
    precisions = args.precisions.split(",")
    mode = args.modes
    if "," in mode:
        mode = trl(args.modes, args.steps, args.threads, args.timeout, args.others)["best"]["mode"]
    own, peer = {precision: [] for precision in precisions}, []
    for _ in range(args.rounds):
        for precision in precisions:
            run = minke(precision, args.steps, args.threads, args.others)
            own[precision].append(run)
            print(f"Minke {precision}: {run['step_s']:.3f} s a step, {run['rollout_tok_s']:.0f} tok/s in rollouts", flush=True)
        peer.append(trl(mode, args.steps, args.threads, args.timeout, args.others)["best"])

    def median(runs, key):
        return statistics.median(run[key] for run in runs)

    print()
    print("| engine | step s | rollout s | rollout tok/s | training s | times TRL's speed | round by round |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for precision, runs in own.items():
        ratios = [other["step_s"] / run["step_s"] for run, other in zip(runs, peer, strict=True)]
        ratio = median(peer, "step_s") / median(runs, "step_s")
        print(f"| Minke, {precision} | {median(runs, 'step_s'):.3f} | {median(runs, 'rollout_s'):.3f} |"
              f" {median(runs, 'rollout_tok_s'):.0f} | {median(runs, 'train_s'):.3f} | {ratio:.2f} |"
              f" {', '.join(f'{each:.2f}' for each in ratios)} |")
    print(f"| TRL, {mode} | {median(peer, 'step_s'):.3f} | {median(peer, 'generation_s'):.3f} |"
          f" {median(peer, 'generation_tok_s'):.0f} | {median(peer, 'train_s'):.3f} | 1 | |")
    shares = [run["others"] for runs in [peer, *own.values()] for run in runs if run["others"] is not None]
    if shares:
        print(f"\nOther processes took at most {max(shares):.0%} of the machine meanwhile.")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"trl_mode": mode, "minke": own, "trl": peer}, indent=1))


if __name__ == "__main__":
    main()
