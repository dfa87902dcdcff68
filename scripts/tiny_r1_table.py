"""What several runs of the tiny R1 and of its ablations showed, as one table.

    for s in 1 2 3; do
        minke make recipes/tiny-r1.toml --set run.seed=$s --out runs/tiny-r1-$s
        minke make recipes/tiny-r1-ablations.toml --set run.seed=$s --set run.after=runs/tiny-r1-$s --out runs/ablations-$s
    done
    python scripts/tiny_r1_table.py runs/tiny-r1-1,runs/ablations-1 runs/tiny-r1-2,runs/ablations-2 ...

Reads `stages/*.json` and `rl/metrics.jsonl` of each pair of folders; needs nothing but Python.
"""

import json
import pathlib
import statistics
import sys


def stage(folder, name):
    path = folder / "stages" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def scores(folder, name):
    made = stage(folder, name)
    return made["result"]["scores"]["values"] if made and made["result"] and made["result"]["scores"] else {}


def part(values, levels):
    """pass@1 of some levels, over all families."""
    found = [v for k, v in values.items() if k.startswith("pass@1/") and int(k.rsplit(":", 1)[-1]) in levels] if values else []
    return statistics.mean(found) if found else None


def by_level(values):
    keep = {k: v for k, v in values.items() if k.startswith("pass@1/") and ":" in k}
    return values.get("pass@1"), part(keep, {1, 2, 3}), part(keep, {4}), values.get("thought")


def steps(folder):
    lines = [json.loads(line) for line in (folder / "rl" / "metrics.jsonl").read_text().splitlines()]
    return [line["values"] for line in lines if line["kind"] == "step"]


def show(value, share=True):
    return "-" if value is None else f"{100 * value:.1f}" if share else f"{value:.1f}"


def row(name, cells):
    """One row: the mean over the runs, and each run's value."""
    shown = []
    for values, share in cells:
        values = [v for v in values if v is not None]
        each = " / ".join(show(v, share) for v in values)
        shown.append(f"{show(statistics.mean(values), share)} ({each})" if values else "-")
    print(f"| {name} | {' | '.join(shown)} |")


def main():
    pairs = [[pathlib.Path(p) for p in arg.split(",")] for arg in sys.argv[1:]]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        sys.exit(__doc__)
    print("| | pass@1, % | levels 1-3 | level 4 | thought, tokens |\n|---|---|---|---|---|")
    for name, which, key in [
        ("base, in the form of its training text", 1, "exam-base"),
        ("after the cold start", 1, "exam-cold-start"),
        ("after RL on levels 1-3", 1, "exam-rl"),
        ("the same with DAPO", 1, "exam-rl-dapo"),
        ("RL without a cold start", 1, "exam-rl-from-base"),
        ("SFT on as many right answers instead", 1, "exam-sft-answers"),
        ("SFT on as many worked thoughts instead", 1, "exam-sft-thoughts"),
        ("final", 0, "exam"),
        ("student, distilled", 0, "student-exam"),
        ("student, RL alone", 1, "exam-student-rl"),
    ]:
        table = [by_level(scores(pair[which], key)) for pair in pairs]
        row(name, [([t[0] for t in table], True), ([t[1] for t in table], True), ([t[2] for t in table], True),
                   ([t[3] for t in table], False)])
    exams = [scores(pair[0], "exam") for pair in pairs]
    row("final, thinking forced empty", [([e.get("pass@1-without-thinking") for e in exams], True)])
    print()
    for level in range(1, 5):
        thoughts = [[v for k, v in e.items() if k.startswith("thought/") and k.endswith(f":{level}")] for e in exams]
        print(f"thought at level {level}: " + " / ".join(show(statistics.mean(t), False) for t in thoughts if t))
    learned = [steps(pair[0]) for pair in pairs]
    for key in ["kl_rollout", "bits_differ", "router_diff"]:
        print(f"largest {key} of all steps of rl: " + " / ".join(str(max(s.get(key, 0.0) for s in run)) for run in learned))
    for run in learned:
        hits = [s["mtp_hits"] for s in run if "mtp_hits" in s]
        tenth = max(1, len(hits) // 10)
        if hits:
            print(f"drafted by the prediction module: {100 * hits[0]:.1f} % in the first step, "
                  f"{100 * statistics.mean(hits[-tenth:]):.1f} % in the last tenth")
    for pair in pairs:
        made = [json.loads(p.read_text()) for p in (pair[0] / "stages").glob("*.json")]
        seconds = {p.stem: json.loads(p.read_text())["seconds"] for pair_part in pair for p in (pair_part / "stages").glob("*.json")}
        print(f"seconds: all of the tiny R1 {sum(m['seconds'] for m in made):.0f}, rl {seconds.get('rl', 0):.0f}; "
              f"student: lessons {seconds.get('lessons', 0):.0f} + distillation {seconds.get('student', 0):.0f} against "
              f"cold start {seconds.get('student-cold-start', 0):.0f} + RL {seconds.get('student-rl', 0):.0f}")


if __name__ == "__main__":
    main()
