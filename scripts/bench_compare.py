"""Training speed of Minke beside PyTorch's, on the same shapes, one after the other on the same machine.

    cargo build --release
    python scripts/bench_compare.py [--shapes A,B,C] [--steps 8] [--rounds 3] [--threads 2]

Each round runs `minke bench train recipes/bench-SHAPE.toml` in bf16 and in f32; then `scripts/bench_torch.py` runs its
modes (eager and compiled, f32 and bf16). Prints a table: tokens per second of Minke (median over rounds), of PyTorch's
best mode, their ratio, the share of the matrix-product peak that Minke measured, and peak memory of both.
Needs the packages of scripts/requirements.txt for PyTorch; `--no-torch` leaves it out.
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
    parser.add_argument("--modes", default="eager-f32,eager-bf16,compile-f32,compile-bf16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-torch", action="store_true")
    args = parser.parse_args()
    shapes = args.shapes.split(",")
    rows = {}
    for shape in shapes:
        for precision in ["bf16", "f32"]:
            runs = [minke(shape, precision, args.steps, args.threads) for _ in range(args.rounds)]
            rows[shape, precision] = {
                "tok_s": statistics.median(run["tok_s"] for run in runs),
                "share": statistics.median(run["gflops"] / run["gemm_peak_gflops"] for run in runs),
                "rss": max(run["peak_rss_bytes"] for run in runs) / 2**20,
            }
    best = {}
    if not args.no_torch:
        for result in torch(shapes, args.modes, args.steps, args.threads)["results"]:  # failed modes have no rate
            if result.get("tok_s") and result["tok_s"] > best.get(result["shape"], {"tok_s": 0})["tok_s"]:
                best[result["shape"]] = result
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
