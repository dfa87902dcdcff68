"""A GRPO step of Minke beside one of TRL's GRPOTrainer, in turn on the same machine: 16 prompts, 8 answers, 48 tokens.

    cargo build --release
    python scripts/bench_grpo_compare.py [--rounds 3] [--modes f32,decode-f32,both-f32] [--precisions bf16,f32] [--threads 2]

First `scripts/bench_trl.py` runs every mode once and the fastest one stands for TRL. Then each round runs
`minke bench grpo recipes/bench-a.toml` once for every precision and TRL's best mode once. Prints the medians over the
rounds, the ratios of TRL's step to Minke's, round by round and of the medians, and the largest share of the machine
that other processes took while TRL ran (a ratio with much of it says little). Needs scripts/requirements.txt.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def minke(precision, steps, threads):
    command = [pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release/minke", "bench", "grpo"]
    command += [ROOT / "recipes/bench-a.toml", "--set", f"precision={precision}"]
    command += ["--steps", str(steps), "--threads", str(threads), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def trl(modes, steps, threads, timeout):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, ROOT / "scripts/bench_trl.py", "--modes", modes, "--steps", str(steps)]
        command += ["--threads", str(threads), "--timeout", str(timeout), "--json", out.name]
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
    parser.add_argument("--timeout", type=float, default=200.0, help="seconds for one run of TRL")
    parser.add_argument("--json", help="write every figure to this file")
    args = parser.parse_args()
    precisions = args.precisions.split(",")
    mode = args.modes
    if "," in mode:
        mode = trl(args.modes, args.steps, args.threads, args.timeout)["best"]["mode"]
    own, peer = {precision: [] for precision in precisions}, []
    for _ in range(args.rounds):
        for precision in precisions:
            own[precision].append(minke(precision, args.steps, args.threads))
        peer.append(trl(mode, args.steps, args.threads, args.timeout)["best"])

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
    shares = [run["others"] for run in peer if run["others"] is not None]
    if shares:
        print(f"\nOther processes took at most {max(shares):.0%} of the machine while TRL ran.")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"trl_mode": mode, "minke": own, "trl": peer}, indent=1))


if __name__ == "__main__":
    main()
