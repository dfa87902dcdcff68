#!/usr/bin/env python3
"""How much a model loses in each format, quantised by Minke and by llama.cpp, at its size.

    cargo build --release
    python scripts/quant_quality.py MODEL --text EVAL.txt [--imatrix CALIBRATION.txt] [--formats Q8_0,Q4_K_M]
        [--llama DIR] [--work DIR] [--threads 2] [--json OUT.json]

MODEL is a model folder or a GGUF file in 16 or 32 bits. It is written as a GGUF file in 16 bits (the reference); then
`minke quantize` and, with `--llama` (a folder with llama.cpp's `llama-quantize` and `llama-imatrix`), llama.cpp make each
format from it, without and, with `--imatrix`, with an importance matrix of that text. `minke eval TEXT --against` measures
every file. Prints a table: bits per weight, perplexity, mean and 99% KL divergence to the reference, and how often the
likeliest token is the same.

A model that was quantised before lies on the grid of that format, and formats with the same grid lose nothing: `--dither`
gives each block of 32 weights of its matrices noise as wide as a step of 4 bits first, and the result is the reference.

With `--judge llama`, llama.cpp's `llama-perplexity` measures instead (512 tokens of context): it has another arithmetic
for products of quantised weights.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MINKE = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release/minke"
FORMATS = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0"


def run(command, **more):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **more)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done


def elements(path):
    """Weights of a GGUF file, as `minke inspect` counts tensors; from the header."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)


def bits(path, weights):
    from gguf import GGUFReader

    return 8.0 * sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors) / weights


def dither(path):
    """Noise as wide as a fifteenth of each block's range, in the matrices of a GGUF file in 16 bits; as seeded."""
    import numpy
    from gguf import GGUFReader

    random = numpy.random.default_rng(7)
    for tensor in GGUFReader(path, "r+").tensors:
        if len(tensor.shape) < 2 or tensor.data.dtype != numpy.float16 or tensor.shape[0] % 32:
            continue
        rows = tensor.data.reshape(-1, 32)
        for at in range(0, len(rows), 1 << 20):
            part = rows[at : at + (1 << 20)].astype(numpy.float32)
            step = (part.max(axis=1) - part.min(axis=1)) / 15.0
            rows[at : at + (1 << 20)] = part + (random.random(part.shape, numpy.float32) - 0.5) * step[:, None]


class Judge:
    """Measures files against the reference."""

    def __init__(self, args, reference):
        self.args, self.reference = args, reference
        self.base = None
        if args.judge == "llama":
            self.base = args.work / "reference.kld"
            if not self.base.exists():
                run([args.llama / "llama-perplexity", "-m", reference, "-f", args.text, "-c", 512, "-t", args.threads, "--kl-divergence-base", self.base])

    def measure(self, path):
        if self.args.judge == "minke":
            command = [MINKE, "eval", path, self.args.text, "--against", self.reference, "--threads", self.args.threads, "--json"]
            found = json.loads(run(command).stdout)["against"]["texts"][0]
            keys = ("perplexity", "reference_perplexity", "kl_mean", "kl_99", "same_top")
            return {key: found[key] for key in keys}
        command = [self.args.llama / "llama-perplexity", "-m", path, "-f", self.args.text, "-c", 512, "-t", self.args.threads]
        done = run(command + ["--kl-divergence-base", self.base, "--kl-divergence"])
        text = done.stdout + done.stderr

        def number(label):
            found = re.search(re.escape(label) + r"\s*:\s*([-+0-9.e]+)", text)
            return float(found.group(1)) if found else float("nan")

        return {
            "perplexity": number("Mean PPL(Q)"),
            "reference_perplexity": number("Mean PPL(base)"),
            "kl_mean": number("Mean    KLD"),
            "kl_99": number("99.0%   KLD"),
            "same_top": number("Same top p") / 100.0,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, type=pathlib.Path)
    parser.add_argument("--imatrix", type=pathlib.Path)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--llama", type=pathlib.Path)
    parser.add_argument("--judge", choices=["minke", "llama"], default="minke")
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.judge == "llama" and not args.llama:
        parser.error("--judge llama needs --llama")
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or pathlib.Path(folder)
        args.work.mkdir(parents=True, exist_ok=True)
        reference = args.work / "reference.gguf"
        if not reference.exists():
            run([MINKE, "export", args.model, "--to", "gguf", "--dtype", "f16", "--out", reference])
            if args.dither:
                dither(reference)
        weights = elements(reference)
        judge = Judge(args, reference)
        of_llama = args.work / "imatrix.gguf"
        if args.imatrix and args.llama and not of_llama.exists():
            run([args.llama / "llama-imatrix", "-m", reference, "-f", args.imatrix, "-o", of_llama, "-t", args.threads])
        rows = []
        for name in args.formats.split(","):
            for by in ["minke", "llama.cpp"] if args.llama else ["minke"]:
                for weighted in [False, True] if args.imatrix else [False]:
                    path = args.work / f"{name}-{by}{'-imatrix' if weighted else ''}.gguf"
                    if by == "minke":
                        command = [MINKE, "quantize", reference, "--to", name, "--out", path, "--force", "--threads", args.threads]
                        command += ["--imatrix", args.imatrix] if weighted else []
                    else:
                        command = [args.llama / "llama-quantize"] + (["--imatrix", of_llama] if weighted else [])
                        command += [reference, path, name, args.threads]
                    run(command)
                    row = {"format": name, "by": by, "imatrix": weighted, "bits": bits(path, weights), **judge.measure(path)}
                    rows.append(row)
                    path.unlink()
                    print(
                        f"{name:8s} {by:10s} {'imatrix' if weighted else '':8s} {row['bits']:6.3f} bits  "
                        f"perplexity {row['perplexity']:9.4f} ({row['reference_perplexity']:.4f})  KL {row['kl_mean']:.6f}, "
                        f"99% {row['kl_99']:.5f}  same top {100 * row['same_top']:.2f}%",
                        flush=True,
                    )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
