"""Training speed of Minke beside PyTorch's, on the same shapes, one after the other on the same machine.

    cargo build --release
    python scripts/bench_compare.py [--shapes A,B,C] [--steps 8] [--rounds 3] [--threads 2] [--precisions bf16,fp8,f32]

Each round runs `minke bench train recipes/bench-SHAPE.toml` in bf16, FP8 and f32, and then `scripts/bench_torch.py` in its
modes (eager and compiled, f32 and bf16). Prints a table: tokens per second of Minke and of PyTorch's best mode (medians
over rounds), their ratio, the share of the matrix-product peak that Minke measured, and peak memory of both.
Needs the packages of scripts/requirements.txt for PyTorch; `--no-torch` leaves it out.
"""

import argparse
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def minke(shape, precision, steps, threads):
    command = [pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release/minke", "bench", "train", ROOT / f"recipes/bench-{shape.lower()}.toml"]
    command += ["--set", f"precision={precision}", "--steps", str(steps), "--threads", str(threads), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def torch(shapes, modes, steps, threads):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, ROOT / "scripts/bench_torch.py", "--shapes", ",".join(shapes), "--modes", modes]
        command += ["--steps", str(max(2, steps // 2)), "--threads", str(threads), "--json", out.name]
        subprocess.run(command, check=True)
        return json.loads(pathlib.Path(out.name).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="A,B,C")
    parser.add_argument("--precisions", default="bf16,fp8,f32")
    parser.add_argument("--modes", default="eager-f32,eager-bf16,compile-f32,compile-bf16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-torch", action="store_true")
    args = parser.parse_args()
    ours, theirs = collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(args.rounds):
        for shape in args.shapes.split(","):
            for precision in args.precisions.split(","):
                ours[shape, precision].append(minke(shape, precision, args.steps, args.threads))
            if not args.no_torch:
                for result in torch([shape], args.modes, args.steps, args.threads)["results"]:
                    if result.get("tok_s"):  # failed modes have no rate
                        theirs[shape, result["mode"], result.get("variant")].append(result)
    rate = lambda runs: statistics.median(run["tok_s"] for run in runs)
    best = {}
    for (shape, mode, _), runs in theirs.items():
        if shape not in best or rate(runs) > best[shape]["tok_s"]:
            best[shape] = {"mode": mode, "tok_s": rate(runs), "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs)}
    rows = {
        key: {
            "tok_s": rate(runs),
            "share": statistics.median(run["gflops"] / run["gemm_peak_gflops"] for run in runs),
            "rss": max(run["peak_rss_bytes"] for run in runs) / 2**20,
        }
        for key, runs in ours.items()
    }
    print("| shape | Minke | tok/s | PyTorch's best | tok/s | ratio | share of GEMM peak | MiB, Minke | MiB, PyTorch |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|")
    for (shape, precision), row in rows.items():
        peer = best.get(shape)
        other = f"{peer['mode']} | {peer['tok_s']:.0f} | {row['tok_s'] / peer['tok_s']:.2f}" if peer else "- | - | -"
        memory = f"{peer['peak_rss_bytes'] / 2**20:.0f}" if peer else "-"
        figures = f"{row['share'] * 100:.0f} % | {row['rss']:.0f} | {memory}"
        print(f"| {shape} | {precision} | {row['tok_s']:.0f} | {other} | {figures} |")


if __name__ == "__main__":
    main()
