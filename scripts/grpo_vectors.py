#!/usr/bin/env python3
# Made with torch 2.15.0, transformers 5.23.0, trl 1.16.0 (requirements.txt).
"""GRPO vectors: losses, gradients and advantages that TRL's GRPOTrainer computes, in one small file.

    python scripts/grpo_vectors.py [--out FILE]     (default: crates/minke-post/tests/vectors/grpo.json)

The numbers come from TRL's own code: a GRPOTrainer is made with a tiny model, its function that runs the model is
replaced by one that gives log-probabilities from here (f64 leaves, so that what is recorded is exact to f64), and its
`_compute_loss` and `_generate_and_score_completions` run as they are.

    advantages  one entry per reward scaling: rewards [groups][answers of a group], advantages of the same shape
    batches     answers with `log_probs`, `old` (when sampled), `reference` (ragged: a row per answer, an answer can be
                empty), `advantages`, and `longest`, TRL's max_completion_length
    cases       TRL's settings as TRL calls them, `batch`, then what came out: `loss`, `gradients` d loss / d log-prob
                (ragged), `kl` (mean over tokens, null without beta), `clip_ratio` (share of clipped tokens, or of
                answers where ratios are of sequences). `on_policy`: no old log-probabilities were given.
                `use_bias_correction_kl` is TRL's default and weighs the divergence by the ratio (DeepSeek-V3.2);
                without it the divergence is DeepSeekMath's.
                `micro_batches`: losses and gradients are sums over that many backward passes of one update.
"""

import argparse
import json
import os
import pathlib
import random
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

OUT = pathlib.Path(__file__).resolve().parent.parent / "crates/minke-post/tests/vectors/grpo.json"
# loss_type, importance_sampling_level, epsilon, epsilon_high; the first of each name has its paper's values.
# GSPO is spelt as TRL's documentation spells it: `grpo` with ratios of sequences. cispo's epsilon_high is the largest
# ratio itself, not its distance from 1.
SETTINGS = {
    "grpo": [("grpo", "token", 0.2, 0.2), ("grpo", "token", 0.1, 0.3)],
    "dr_grpo": [("dr_grpo", "token", 0.2, 0.2)],
    "dapo": [("dapo", "token", 0.2, 0.28)],
    "bnpo": [("bnpo", "token", 0.2, 0.28)],
    "gspo": [("grpo", "sequence", 3e-4, 4e-4), ("grpo", "sequence", 0.05, 0.08)],
    "cispo": [("cispo", "token", 0.2, 1.28), ("cispo", "token", 0.2, 5.0)],
}


class Given(GRPOTrainer):
    """TRL's trainer, with log-probabilities, answers and rewards from outside."""

    given = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.given, torch.zeros_like(self.given), None

    def _generate(self, prompts):
        n = len(prompts)
        return [[1]] * n, [[2, 0]] * n, None, ["b"] * n, None, {}, None, []

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self.given[:, None]


def trainer(folder):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return Given(
        model=LlamaForCausalLM(config),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(output_dir=folder, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=4,
                        num_generations=4, gradient_checkpointing=False),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"),
    )


def exact(x):
    """Twelve digits: f64 without the noise of its last bits."""
    return float(f"{x:.12g}")


def advantages(grpo, scale, rng):
    groups = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.1, 0.1, -0.5, 1.0], [1.0, 0.0, 1.0, 0.0]]
    groups += [[round(rng.uniform(-1, 2), 3) for _ in range(4)] for _ in range(3)]
    grpo.scale_rewards = scale
    grpo.num_generations = 4
    grpo.given = torch.tensor(groups, dtype=torch.float64).flatten()
    out = grpo._generate_and_score_completions([{"prompt": "a"} for _ in range(grpo.given.numel())])["advantages"]
    return {
        "scale_rewards": scale,
        "rewards": groups,
        "advantages": [[exact(value) for value in group] for group in out.view(-1, 4).tolist()],
    }


def batch(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 7) for _ in range(6)]
    if seed == 2:
        lengths[3] = 0  # as mask_truncated_completions leaves an answer
    near = lambda rows, spread: [[round(min(-1e-3, p + rng.gauss(0, spread)), 3) for p in row] for row in rows]
    log_probs = [[round(-rng.expovariate(0.8) - 1e-3, 3) for _ in range(length)] for length in lengths]
    return {
        "log_probs": log_probs,
        "old": near(log_probs, (0.05, 0.2, 0.5)[seed]),
        "reference": near(log_probs, 0.3),
        "advantages": [round(rng.gauss(0, 1), 3) for _ in lengths],
        "longest": 9,
    }


def padded(rows):
    width = max(map(len, rows)) + 1  # one column that is padding for all
    # f32 first: these are the values that a reader of f32 sees
    return torch.tensor([row + [-1.0] * (width - len(row)) for row in rows], dtype=torch.float32).double()


def case(grpo, batches, index, name, settings, beta, on_policy, micro_batches, corrected=False):
    loss_type, level, epsilon, epsilon_high = settings
    data = batches[index]
    grpo.loss_type, grpo.importance_sampling_level = loss_type, level
    grpo.epsilon_low, grpo.epsilon_high, grpo.beta = epsilon, epsilon_high, beta
    grpo.max_completion_length = data["longest"]
    grpo.current_gradient_accumulation_steps = grpo.args.steps_per_generation = micro_batches
    grpo.args.use_bias_correction_kl = corrected
    grpo._metrics["train"].clear()
    log_probs = padded(data["log_probs"])
    mask = torch.tensor([[int(t < len(row)) for t in range(log_probs.size(1))] for row in data["log_probs"]])
    n = len(mask)
    inputs = {
        "prompt_ids": torch.ones(n, 1, dtype=torch.long),
        "prompt_mask": torch.ones(n, 1, dtype=torch.long),
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(data["advantages"], dtype=torch.float64),
        "ref_per_token_logps": padded(data["reference"]),
    }
    if not on_policy:
        inputs["old_per_token_logps"] = padded(data["old"])
    loss, gradients = 0.0, []
    for part in range(micro_batches):
        rows = slice(part * n // micro_batches, (part + 1) * n // micro_batches)
        grpo.given = log_probs[rows].clone().requires_grad_()
        part_loss = grpo._compute_loss(grpo.model, {key: value[rows] for key, value in inputs.items()}
                                       | {"num_items_in_batch": mask.sum()})
        part_loss.backward()
        loss += part_loss.item()
        gradients += grpo.given.grad.tolist()
    assert all(g == 0 for row, m in zip(gradients, mask.tolist()) for g, m in zip(row, m) if not m)
    metrics = grpo._metrics["train"]
    clip = metrics["cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/region_mean"]
    whole = micro_batches == 1
    return {
        "name": name, "batch": index, "loss_type": loss_type, "importance_sampling_level": level,
        "epsilon": epsilon, "epsilon_high": epsilon_high, "beta": beta, "use_bias_correction_kl": corrected, "on_policy": on_policy,
        "micro_batches": micro_batches, "loss": exact(loss),
        "gradients": [[exact(g) for g in row[:len(kept)]] for row, kept in zip(gradients, data["log_probs"])],
        "kl": exact(metrics["kl"][0]) if beta and whole else None,
        "clip_ratio": exact(clip[0]) if whole else None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(7)
    with tempfile.TemporaryDirectory() as folder:
        grpo = trainer(folder)
        scaled = [advantages(grpo, scale, rng) for scale in ("group", "none")]
        grpo.model.train()
        batches = [batch(seed) for seed in range(3)]
        cases = []
        for name, variants in SETTINGS.items():
            for number, settings in enumerate(variants):
                for index in range(len(batches)):
                    cases.append(case(grpo, batches, index, name, settings, 0.0, False, 1))
                    if number == 0:
                        cases.append(case(grpo, batches, index, name, settings, 0.04, False, 1))
                if number == 0:
                    for beta in (0.0, 0.5):
                        cases.append(case(grpo, batches, 1, name, settings, beta, True, 1))
                    for on_policy in (False, True):
                        cases.append(case(grpo, batches, 1, name, settings, 0.5, on_policy, 1, corrected=True))
                    if name != "bnpo":  # whose loss depends on how the batch is cut
                        cases.append(case(grpo, batches, 1, name, settings, 0.04, False, 2))
    made_with = {module.__name__: module.__version__.split("+")[0] for module in (trl, transformers, torch)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = lambda items: "[\n" + ",\n".join("    " + json.dumps(item) for item in items) + "\n  ]"
    args.out.write_text(f'{{\n  "made_with": {json.dumps(made_with)},\n  "advantages": {lines(scaled)},\n'
                        f'  "batches": {lines(batches)},\n  "cases": {lines(cases)}\n}}\n')
    clipped = [c["clip_ratio"] for c in cases if c["clip_ratio"] is not None and not c["on_policy"]]
    print(f"{args.out}: {len(cases)} cases, {sum(0 < c < 1 for c in clipped)} of {len(clipped)} off-policy ones partly clipped")


if __name__ == "__main__":
    main()
