#!/usr/bin/env python3
"""Does transformers load, score and generate from a folder that Minke wrote?

    python scripts/check_hf_folder.py FOLDER
        [--minke-logits FILE.safetensors --tokens FILE.json [--tol 1e-4]]
        [--generate TEXT [--new-tokens 40]]

Loads FOLDER with AutoModelForCausalLM (float32, eager) and AutoTokenizer.
Missing, unexpected or mismatched keys are errors; the keys of MTP modules,
`model.layers.N` with num_hidden_layers <= N < num_hidden_layers +
num_nextn_predict_layers, are counted and left out, as transformers leaves
them out. With `--minke-logits` the tensors `logits.0`, `logits.1`, ...
[tokens, vocabulary] that `minke score FOLDER --tokens FILE.json --logits
FILE.safetensors` wrote are compared with transformers' for the sequences of
FILE.json (`{"sequences": [[ids...], ...]}`): largest absolute difference over
all of them, and how many next-token choices agree. With `--generate` a greedy
continuation of TEXT is printed.

Exit status: 0 all well, 1 a difference above --tol or a key error, 2 wrong use
or unreadable files.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def load(folder):
    """(model, number of key errors)."""
    config = AutoConfig.from_pretrained(folder)
    layers = config.num_hidden_layers
    depth = getattr(config, "num_nextn_predict_layers", 0) or 0
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    model.eval()
    mtp = 0
    errors = []
    for key in sorted(info["unexpected_keys"]):
        layer = re.match(r"model\.layers\.(\d+)\.", key)
        if layer and layers <= int(layer[1]) < layers + depth:
            mtp += 1
        else:
            errors.append(f"unexpected key {key}")
    errors += [f"missing key {key}" for key in sorted(info["missing_keys"])]
    errors += [f"mismatched key {key}" for key in sorted(map(str, info["mismatched_keys"]))]
    parameters = sum(value.numel() for value in model.parameters())
    print(f"{folder}: {config.model_type}, {parameters} parameters, {layers} layers, {mtp} MTP tensors left out")
    for error in errors:
        print(f"error: {error}")
    return model, len(errors)


def compare(model, tokens_file, logits_file, tolerance):
    """Whether Minke's logits agree with transformers'."""
    sequences = json.loads(Path(tokens_file).read_text())["sequences"]
    stored = load_file(logits_file)
    expected = {f"logits.{i}" for i in range(len(sequences))}
    if set(stored) != expected:
        print(f"error: {logits_file} holds {sorted(stored)}, expected {sorted(expected)}")
        return False
    worst, agree, count, fine = 0.0, 0, 0, True
    for i, sequence in enumerate(sequences):
        ours = stored[f"logits.{i}"].to(torch.float32)
        with torch.no_grad():
            theirs = model(torch.tensor([sequence]), use_cache=False).logits[0].float()
        if ours.shape != theirs.shape:
            print(f"error: logits.{i} is {list(ours.shape)}, expected {list(theirs.shape)}")
            return False
        difference = (ours - theirs).abs()
        if not torch.isfinite(difference).all():
            print(f"error: logits.{i}: a value is not finite")
            fine = False
            continue
        row = difference.max(dim=1).values
        worst = max(worst, row.max().item())
        agree += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        count += len(sequence)
        print(
            f"logits.{i}: {len(sequence)} tokens, max |difference| {row.max().item():.3e}"
            f" at position {row.argmax().item()}, std of logits {theirs.std().item():.3f}"
        )
    print(f"max |difference| {worst:.3e} (tolerance {tolerance:.1e}), same choice {agree}/{count}")
    return fine and worst <= tolerance


def generate(model, folder, text, new_tokens):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    ids = inputs["input_ids"]
    if ids.numel() and ids.max().item() >= model.config.vocab_size:
        print(f"error: the tokenizer gives id {ids.max().item()}, the vocabulary has {model.config.vocab_size}")
        return False
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=inputs["attention_mask"], max_new_tokens=new_tokens, do_sample=False
        )
    print(f"ids: {out[0].tolist()}")
    print(tokenizer.decode(out[0], skip_special_tokens=False))
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minke-logits", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("--generate", metavar="TEXT")
    parser.add_argument("--new-tokens", type=int, default=40)
    options = parser.parse_args()
    if (options.minke_logits is None) != (options.tokens is None):
        parser.error("--minke-logits and --tokens go together")
    for path in (options.folder / "config.json", options.minke_logits, options.tokens):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    model, errors = load(options.folder)
    fine = errors == 0
    if options.tokens is not None:
        fine &= compare(model, options.tokens, options.minke_logits, options.tol)
    if options.generate is not None:
        fine &= generate(model, options.folder, options.generate, options.new_tokens)
    print("ok" if fine else "FAILED")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
