#!/usr/bin/env python3
"""Are the weights of an FP8 folder for transformers what they are for Minke?

    minke export MODEL --to hf --dtype fp8 --out FP8
    minke export FP8 --to hf --dtype f32 --out F32
    python scripts/check_fp8_folder.py FP8 F32 [--load]

FP8 is a folder with `quantization_config`; F32 is what Minke makes of it. Every
tensor of FP8 is read by transformers' own code: E4M3 codes by
`_dequantize_fp8_weight` of its FP8 integration, and by `Fp8Dequantize`, the
operation that loading uses, where that can read the shape (it takes rows /
scale rows for the side of a square, so the last squares must be whole, or there
must be one only); the others are widened. Each must be equal to the tensor of
F32, bit for bit. `FineGrainedFP8Config` must take the folder's
`quantization_config`.

With `--load`, AutoModelForCausalLM loads both folders (`dequantize=True`,
float32), and all parameters and the logits of a few tokens must be equal; only
for folders whose shapes that operation can read.

Exit status: 0 all equal, 1 a difference, 2 wrong use.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

SCALES = "_scale_inv"


def tensors(folder):
    """Name to tensor, from one file or several."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def same(ours, theirs):
    return ours.shape == theirs.shape and torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def compare(quantized, plain, block):
    """(number of differences, weights in FP8, of these read by both functions)."""
    errors, count, both = 0, 0, 0
    if set(plain) != {name for name in quantized if not name.endswith(SCALES)}:
        print(f"error: other tensors: {sorted(set(plain) ^ set(quantized))[:5]}")
        errors += 1
    for name in sorted(plain):
        stored = quantized.get(name)
        if stored is None:
            continue
        values = [stored.float()]
        if stored.dtype == torch.float8_e4m3fn:
            count += 1
            scales = quantized[name + SCALES].float()
            values = [_dequantize_fp8_weight(stored, scales, block, torch.float32)]
            if all(size % side == 0 or size < side for size, side in zip(stored.shape, block)):
                values.append(Fp8Dequantize(None)._dequantize_one(stored, scales, torch.float32))
                both += 1
        for value in values:
            if not same(plain[name], value.contiguous()):
                print(f"error: {name} {list(stored.shape)} differs")
                errors += 1
    return errors, count, both


def load(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    # what is not quantised keeps the dtype that it is stored in, whatever is asked for: widened here
    return model.eval().float()


def compare_loaded(quantized, plain):
    theirs = load(quantized, quantization_config=FineGrainedFP8Config(dequantize=True))
    ours = load(plain)
    parameters = dict(ours.named_parameters())
    errors = 0
    for name, value in theirs.named_parameters():
        if not torch.equal(value, parameters.pop(name)):
            print(f"error: loaded {name} differs")
            errors += 1
    ids = torch.arange(2, 22).unsqueeze(0) % ours.config.vocab_size
    with torch.no_grad():
        difference = (theirs(ids).logits - ours(ids).logits).abs().max().item()
    print(f"loaded: {len(parameters)} parameters left over, max |difference| of logits {difference:.3e}")
    return errors + len(parameters) + (difference != 0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fp8", type=Path)
    parser.add_argument("f32", type=Path)
    parser.add_argument("--load", action="store_true")
    options = parser.parse_args()
    for folder in (options.fp8, options.f32):
        if not (folder / "config.json").is_file():
            parser.error(f"{folder} has no config.json")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    config = FineGrainedFP8Config(
        **json.loads((options.fp8 / "config.json").read_text())["quantization_config"]
    )
    if "quantization_config" in json.loads((options.f32 / "config.json").read_text()):
        parser.error(f"{options.f32} has a quantization_config")
    block = list(config.weight_block_size)
    errors, count, both = compare(tensors(options.fp8), tensors(options.f32), block)
    print(f"{options.fp8}: {count} weights in FP8, scales {config.scale_fmt}, {both} of them read by both functions")
    if options.load:
        errors += compare_loaded(options.fp8, options.f32)
    fine = errors == 0 and count > 0
    print("ok" if fine else "FAILED")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
