"""What `minke inspect` foretells beside what training then takes: peak memory and the time of a step.

    cargo build --release && python scripts/check_predictions.py
    python scripts/check_predictions.py --recipes bench-a,moe-150m --threads 2 --rounds 3

Each case is foretold, measured by `minke bench train`, and foretold again, `rounds` times; medians are compared, and the
mean of both predictions of a round, so that a machine whose speed wanders is asked at both ends of the wandering. Exit
code 1 where memory is off by more than 10 % or time by more than 25 %.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def minke(*args):
    command = [str(ROOT / "target/release/minke"), *map(str, args), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def case(recipe, precision, threads, recompute, steps, rounds):
    path = ROOT / "recipes" / f"{recipe}.toml"
    sets = ["--set", f"precision={precision}", "--set", f"train.recompute={recompute}", "--threads", threads]
    told, took, memory, peak = [], [], None, 0
    for _ in range(rounds):
        before = minke("inspect", path, *sets)["training"]
        figures = minke("bench", "train", path, *sets, "--steps", steps)
        after = minke("inspect", path, *sets)["training"]
        told.append(500 * (before["time"]["step_s"] + after["time"]["step_s"]))
        took.append(figures["step_ms"])
        # random tokens need no preparing
        memory = before["memory"]["peak_bytes"] - before["memory"]["data_bytes"]
        peak = max(peak, figures["peak_rss_bytes"])
    return memory / 2**20, peak / 2**20, statistics.median(told), statistics.median(took)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", default="bench-a,bench-b,bench-c,quickstart,moe-150m")
    parser.add_argument("--precisions", default="bf16,f32,fp8")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    print("| recipe | precision | threads | recompute | MiB told | MiB | off | step ms told | step ms | off |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|---:|")
    missed = 0
    for recipe in args.recipes.split(","):
        for precision in args.precisions.split(","):
            for threads in args.threads.split(","):
                for recompute in args.recompute.split(","):
                    told, peak, told_ms, took_ms = case(
                        recipe, precision, threads, recompute, args.steps, args.rounds
                    )
                    memory, time = told / peak - 1, told_ms / took_ms - 1
                    missed += (abs(memory) > 0.1) + (abs(time) > 0.25)
                    print(
                        f"| {recipe} | {precision} | {threads} | {recompute} | {told:.0f} | {peak:.0f} "
                        f"| {memory:+.1%} | {told_ms:.0f} | {took_ms:.0f} | {time:+.1%} |",
                        flush=True,
                    )
    print(f"{missed} missed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
