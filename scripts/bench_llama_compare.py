"""Prefill and decoding of GGUF files, Minke and llama.cpp in turns, medians of some rounds.

    pip download --no-binary :all: --no-deps llama-cpp-python    # its archive has llama.cpp; build llama-bench from it
    python scripts/bench_llama_compare.py MODEL.gguf... --llama-bench PATH [--minke target/release/minke]

Both run on the same file with as many threads, one after the other in every round, so that a machine that wanders does so
for both. The machine should do nothing else.
"""

import argparse
import json
import statistics
import subprocess


def run(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def minke(program, model, args):
    common = ["--threads", str(args.threads), "--json"]
    out = run([program, "bench", "infer", model, "--prefill", str(args.prefill), "--decode", str(args.decode), *common])
    report = json.loads(out)
    return report["prefill_tok_s"], report["decode_tok_s"], report["peak_rss_bytes"] / 2**20


def llama(program, model, args):
    command = [program, "-m", model, "-t", str(args.threads), "-r", "3", "-o", "json"]
    rows = json.loads(run([*command, "-p", str(args.prefill), "-n", str(args.decode)]))
    prefill = next(row["avg_ts"] for row in rows if row["n_gen"] == 0)
    decode = next(row["avg_ts"] for row in rows if row["n_gen"] > 0)
    return prefill, decode, float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files")
    parser.add_argument("--llama-bench", required=True, help="the program of llama.cpp")
    parser.add_argument("--minke", default="target/release/minke")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| file | | Minke | llama.cpp | ratio |\n|---|---|---:|---:|---:|")
    for model in args.models:
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(minke(args.minke, model, args))
            theirs.append(llama(args.llama_bench, model, args))
        name = model.rsplit("/", 1)[-1]
        for index, what in enumerate(["prefill, tokens/s", "decode, tokens/s"]):
            a, b = (statistics.median(row[index] for row in rows) for rows in (ours, theirs))
            print(f"| {name} | {what} | {a:.1f} | {b:.1f} | {a / b:.2f} |")
        print(f"| {name} | peak memory, MiB | {statistics.median(row[2] for row in ours):.0f} | | |", flush=True)


if __name__ == "__main__":
    main()
