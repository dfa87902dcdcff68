"""Prefill and decoding of GGUF files, Minke and llama.cpp in turns, medians of some rounds.

    pip download --no-binary :all: --no-deps llama-cpp-python    # its archive has llama.cpp; build llama-bench from it
    python scripts/bench_llama_compare.py MODEL.gguf... --llama-bench PATH [--minke target/release/minke]

Both run on the same file with as many threads, one after the other in every round, so that a machine that wanders does so
for both. The machine should do nothing else. `scripts/random_model.py` makes models of published shapes.
"""

import argparse
import json
import os
import statistics
import subprocess


def run(command):
    """What a command prints, and the most memory that it held, in MiB."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)}: status {status}")
    return json.loads(out), usage.ru_maxrss / 2**10


def minke(args, model, prefill, decode, depth):
    """Tokens a second: of reading where nothing is decoded, of decoding behind `depth` tokens else."""
    lengths = ["--prefill", str(prefill or max(depth, 1)), "--decode", str(decode or 1)]
    options = ["--threads", str(args.threads), "--runs", str(args.runs), "--json"]
    report, _ = run([args.minke, "bench", "infer", model, *lengths, *options])
    # (before it measured the machine's memory, which takes half a GiB)
    return report["decode_tok_s" if decode else "prefill_tok_s"], report["peak_rss_bytes"] / 2**20


def llama(args, model, prefill, decode, depth):
    lengths = ["-p", str(prefill), "-n", str(decode), "-d", str(depth)]
    options = ["--repack", "0"] if args.no_repack else []
    rows, memory = run([args.llama_bench, *options, "-m", model, "-t", str(args.threads), "-r", str(args.runs), "-o", "json", *lengths])
    return rows[0]["avg_ts"], memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files")
    parser.add_argument("--llama-bench", required=True, help="the program of llama.cpp")
    parser.add_argument("--minke", default="target/release/minke")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512, help="tokens to read")
    parser.add_argument("--decode", type=int, default=128, help="tokens to write")
    parser.add_argument("--depth", type=int, default=2048, help="tokens before them in the third measurement; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2, help="measurements of each program in a round")
    parser.add_argument("--no-repack", action="store_true", help="llama.cpp without its own layouts; with latent attention "
                        "in AMX's it stops (GGML_ASSERT in ggml-backend.cpp)")
    args = parser.parse_args()
    kinds = {
        f"read {args.prefill}": (args.prefill, 0, 0),
        f"write {args.decode}": (0, args.decode, 0),
        f"write {args.decode} behind {args.depth}": (0, args.decode, args.depth),
    }
    if args.depth == 0:
        kinds.popitem()
    print("| file | tokens/s | Minke | llama.cpp | ratio | peak memory, MiB |\n|---|---|---:|---:|---:|---:|")
    for model in args.models:
        name = model.rsplit("/", 1)[-1]
        for kind, lengths in kinds.items():
            ours, theirs = [], []
            for _ in range(args.rounds):
                ours.append(minke(args, model, *lengths))
                theirs.append(llama(args, model, *lengths))
            (a, memory), (b, their_memory) = (map(statistics.median, zip(*rows)) for rows in (ours, theirs))
            memory = f"{memory:.0f} and {their_memory:.0f}"
            print(f"| {name} | {kind} | {a:.1f} | {b:.1f} | {a / b:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
