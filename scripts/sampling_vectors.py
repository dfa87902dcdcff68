"""Writes crates/minke-infer/tests/vectors/sampling.json: what the logits processors of Hugging Face transformers make of
random rows, one after the other as `generate` orders them.

    python scripts/sampling_vectors.py

Needs torch and transformers.
"""

import json
from pathlib import Path

import torch
from transformers.generation import logits_process as lp

W = 64
OUT = Path(__file__).parent.parent / "crates/minke-infer/tests/vectors/sampling.json"

torch.manual_seed(1)
cases = []
settings = [
    {"temperature": 0.7},
    {"top_k": 9},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.3},
    {"typical_p": 0.9},
    {"repetition_penalty": 1.4},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.8},
    {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 0.8, "logit_bias": [[3, 4.5], [7, -2.0]]},
    {"temperature": 0.9, "typical_p": 0.5, "top_k": 20, "repetition_penalty": 1.2, "logit_bias": [[0, 1.0]]},
]
for setting in settings:
    for _ in range(4):
        logits = torch.randn(1, W) * 3
        ids = torch.randint(0, W, (1, 12))
        x = logits.clone()
        if bias := setting.get("logit_bias"):
            x = lp.SequenceBiasLogitsProcessor([[[i], b] for i, b in bias])(ids, x)
        if (penalty := setting.get("repetition_penalty", 1.0)) != 1.0:
            x = lp.RepetitionPenaltyLogitsProcessor(penalty)(ids, x)
        changed = x.clone()
        x = lp.TemperatureLogitsWarper(setting.get("temperature", 1.0))(ids, x)
        if k := setting.get("top_k"):
            x = lp.TopKLogitsWarper(k)(ids, x)
        if p := setting.get("top_p"):
            x = lp.TopPLogitsWarper(p)(ids, x)
        if p := setting.get("min_p"):
            x = lp.MinPLogitsWarper(p)(ids, x)
        if p := setting.get("typical_p"):
            x = lp.TypicalLogitsWarper(mass=p)(ids, x)
        cases.append(
            {
                "setting": setting,
                "tokens": ids[0].tolist(),
                "logits": logits[0].tolist(),
                "changed": changed[0].tolist(),
                "kept": torch.isfinite(x[0]).nonzero()[:, 0].tolist(),
            }
        )
OUT.write_text(json.dumps({"w": W, "cases": cases}) + "\n")
print(f"{OUT}: {len(cases)} cases, {OUT.stat().st_size} bytes")
