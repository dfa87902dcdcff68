"""The held-out loss of runs in several precisions, seed by seed, as Markdown.

    for seed in 1 2 3; do for p in f32 bf16 fp8; do
        minke pretrain recipes/quickstart.toml --set precision=$p --set run.seed=$seed --out runs/precision/$p-$seed
    done; done
    T='precision={linear="fp8",expert="fp8",attention="fp8",scaling="tensor"}'
    for seed in 1 2 3; do
        minke pretrain recipes/quickstart.toml --set "$T" --set run.seed=$seed --out runs/precision/tensor-$seed
    done
    python scripts/fp8_table.py runs/precision

Folders are named PRECISION-SEED. Prints, for every checkpoint, the mean over seeds of each precision's loss and its gap to
bf16 of the same seed (mean, and half the width of its 95 % interval), then the last checkpoint seed by seed.
"""

import collections
import json
import math
import pathlib
import statistics
import sys

# two-sided 95 % points of Student's t with n - 1 degrees of freedom
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = (json.loads(line) for line in lines)
    return {r["step"]: r["loss"] for r in records if r["kind"] == "evaluation"}


def gap(runs, precision, base, step):
    """Relative gaps in percent, one per seed that both have."""
    both = sorted(set(runs[precision]) & set(runs[base]))
    pairs = [(runs[precision][s].get(step), runs[base][s].get(step)) for s in both]
    return [100 * (a - b) / b for a, b in pairs if a is not None and b is not None]


def cell(gaps):
    if not gaps:
        return "-"
    if len(gaps) == 1:
        return f"{gaps[0]:+.2f}"
    half = T95.get(len(gaps), 1.96) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{statistics.mean(gaps):+.2f} ± {half:.2f}"


def main():
    runs = collections.defaultdict(dict)
    for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        precision, _, seed = folder.name.rpartition("-")
        if seed.isdigit() and (folder / "metrics.jsonl").exists():
            found = losses(folder)
            if found:
                runs[precision][int(seed)] = found
    order = [p for p in ["f32", "bf16", "fp8", "tensor"] if p in runs] + sorted(set(runs) - {"f32", "bf16", "fp8", "tensor"})
    others = [p for p in order if p != "bf16"]
    steps = sorted({step for p in runs.values() for seed in p.values() for step in seed})
    print("| step | " + " | ".join(order) + " | " + " | ".join(f"{p} to bf16, %" for p in others) + " |")
    print("|---:|" + "---:|" * (len(order) + len(others)))
    for step in steps:
        means = []
        for p in order:
            have = [seed[step] for seed in runs[p].values() if step in seed]
            means.append(f"{statistics.mean(have):.4f}" if have else "-")
        print(f"| {step} | " + " | ".join(means) + " | " + " | ".join(cell(gap(runs, p, "bf16", step)) for p in others) + " |")
    last = steps[-1]
    print(f"\nAt step {last}, seed by seed:\n")
    seeds = sorted({seed for p in runs.values() for seed in p})
    print("| seed | " + " | ".join(order) + " |")
    print("|---:|" + "---:|" * len(order))
    for seed in seeds:
        print(f"| {seed} | " + " | ".join(f"{runs[p][seed][last]:.4f}" if runs[p].get(seed, {}).get(last) else "-" for p in order) + " |")


main()
