#!/usr/bin/env python3
# Made with gguf 0.19.0 and the ggml of llama-cpp-python 0.3.36.
"""Test vectors of block formats: what gguf decodes, and how much ggml's quantisers lose.

    python scripts/block_vectors.py --ggml libggml-base.so [--out DIR]

Writes into DIR (default: `crates/minke-num/tests/vectors/blocks`)

`FORMAT.bin`   blocks of random bytes with scales of ordinary size, the last with any scales, then the numbers (f32)
               that gguf's `dequantize` makes of them
`rows.bf16`    8 rows of 1,024 numbers: 4 normal, 4 from Student's t with 4 degrees of freedom
`columns.bf16` an importance of each column
`ggml.txt`     for each format that ggml quantises: relative errors of its quantiser on these rows,
               `sqrt(sum w (x - y)^2 / sum w x^2)`: without importance, w = 1; with importance, w = importance
"""

import argparse
import ctypes
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quant_shape_to_byte_shape
from gguf.quants import dequantize

OUT = Path(__file__).resolve().parent.parent / "crates/minke-num/tests/vectors/blocks"
# format: where in a block its f16 scales are
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}


def bf16(x):
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def f32(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20261126)
    for name, places in SCALES.items():
        kind = GGMLQuantizationType[name]
        length, size = GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (3 if length == 256 else 9, size), dtype=np.uint8)
        for place in places:
            scales = (rng.standard_normal(len(blocks) - 1) * 0.01).astype(np.float16)
            blocks[:-1, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
        with np.errstate(all="ignore"):
            numbers = dequantize(blocks.reshape(1, -1), kind)
        (args.out / f"{name}.bin").write_bytes(blocks.tobytes() + numbers.astype("<f4").tobytes())
    rows = np.concatenate([rng.standard_normal((4, 1024)), rng.standard_t(4, (4, 1024))]) * 0.02
    columns = np.exp(rng.standard_normal(1024))
    (args.out / "rows.bf16").write_bytes(bf16(rows).tobytes())
    (args.out / "columns.bf16").write_bytes(bf16(columns).tobytes())
    rows, columns = np.ascontiguousarray(f32(bf16(rows))), np.ascontiguousarray(f32(bf16(columns)))
    quantize = ctypes.CDLL(args.ggml).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    lines = []
    for name in SCALES:
        kind = GGMLQuantizationType[name]
        errors = []
        for importance in (None, columns):
            out = np.zeros(quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
            given = None if importance is None else importance.ctypes.data
            quantize(int(kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, given)
            w = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
            y = dequantize(out, kind).astype(np.float64)
            errors.append(np.sqrt((w * (rows - y) ** 2).sum() / (w * rows.astype(np.float64) ** 2).sum()))
        lines.append(f"{name} {errors[0]:.6f} {errors[1]:.6f}\n")
    (args.out / "ggml.txt").write_text("".join(lines))
    print("".join(lines), end="")


if __name__ == "__main__":
    main()
