#!/usr/bin/env python3
# Made with torch 2.15.0, transformers 5.23.0, safetensors 0.8.0 (requirements.txt).
"""Test vectors of FP8 weights: torch quantises, transformers dequantises.

    python scripts/fp8_vectors.py [--out DIR]

Writes into DIR (default: `crates/minke-data/tests/vectors/fp8`)

`model.safetensors`    for each case X: `X.weight` F8_E4M3 [n, k] and
                       `X.weight_scale_inv` [ceil(n/128), ceil(k/128)] in F32,
                       BF16 or F8_E8M0
`expected.safetensors` `X.weight` F32: what transformers makes of these two,
                       `_dequantize_fp8_weight` of its FP8 integration, and
                       where every square is whole (or there is only one) also
                       what its loading operation `Fp8Dequantize` makes, which
                       must be the same. That operation takes rows / scale rows
                       for the side of a square, so it cannot read a matrix
                       whose last squares are cut short.
                       `X.source` BF16, the weight that was quantised, for the
                       cases f32 and ue8m0.

Codes are `(w / scale).clamp(-448, 448).to(float8_e4m3fn)`, with the scale
`amax / 448` of each square, for ue8m0 rounded up to a power of two.
"""

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "crates/minke-data/tests/vectors/fp8"
BLOCK = 128
# name: shape, powers of two, dtype of the stored scales
CASES = {
    "f32": ((130, 257), False, torch.float32),
    "ue8m0": ((257, 130), True, torch.float32),
    "bf16": ((129, 40), True, torch.bfloat16),
    "e8m0": ((40, 129), True, torch.float8_e8m0fnu),
    "whole": ((128, 256), False, torch.float32),
    "one": ((48, 32), False, torch.float32),
}


def quantize(w, power_of_two):
    rows, cols = w.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(rows / BLOCK), math.ceil(cols / BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            square = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale = w[square].abs().max() / 448.0
            if power_of_two:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scales[i, j] = scale
            codes[square] = (w[square] / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes, scales


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model, expected = {}, {}
    for seed, (name, (shape, power_of_two, stored)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(shape, generator=generator) * 0.02
        # squares of different sizes, and numbers far below their square's largest
        w *= torch.exp2(torch.randint(-12, 3, shape, generator=generator).clamp(max=0).float())
        w[:, shape[1] // 2 :] *= 11.0
        w = w.to(torch.bfloat16).float()
        codes, scales = quantize(w, power_of_two)
        model[f"{name}.weight"] = codes
        model[f"{name}.weight_scale_inv"] = scales.to(stored)
        assert torch.equal(scales.to(stored).float(), scales)
        values = _dequantize_fp8_weight(codes, scales, [BLOCK, BLOCK], torch.float32)
        if all(size % BLOCK == 0 or size < BLOCK for size in shape):
            loaded = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
            assert torch.equal(loaded, values), name
        expected[f"{name}.weight"] = values
        if name in ("f32", "ue8m0"):
            expected[f"{name}.source"] = w.to(torch.bfloat16)
    save_file(model, out / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, out / "expected.safetensors", metadata={"made_by": "scripts/fp8_vectors.py"})
    for file in sorted(out.iterdir()):
        print(file.name, file.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
