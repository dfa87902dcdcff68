#!/usr/bin/env python3
# Made with torch 2.15.0, transformers 5.23.0, safetensors 0.8.0 (requirements.txt).
"""Parity vectors: what Hugging Face transformers computes, in small files.

    python scripts/parity_vectors.py [--out DIR] [NAME ...]

For every configuration of `CASES` a folder `DIR/NAME` is written
(default: `crates/minke-model/tests/vectors`):

`config.json`          as transformers writes it, or (`"published"`) as the
                       published checkpoints carry it: `rope_theta` and
                       `rope_scaling` at top level, `type` instead of
                       `rope_type`, extra keys such as `scoring_func`.
`model.safetensors`    f32 weights under the published keys, all random:
                       norm weights in [0.6, 1.4] (in Gemma, which adds one,
                       in [-0.4, 0.4]), biases non-zero. Tied models have no
                       `lm_head.weight`.
`vectors.safetensors`  what transformers computes from these two files, f32,
                       eager attention, eager experts:

    input_ids       i64 [b, t]      b = 2
    logits          [b, t, w]
    loss            [1]             mean over b * (t-1) positions of
                                    -log softmax(logits[i])[input_ids[i+1]]
    mtp_logits.j    [b, t-k, w]     MTP configurations only, k = j+1
    mtp_loss.j      [1]             mean over b * (t-k-1) labels
    total_loss      [1]             loss + 0.3 * mean_j mtp_loss.j (or = loss)
    grad.KEY        shape of KEY    d total_loss / d KEY for every parameter of
                                    model.safetensors (not for the buffer
                                    e_score_correction_bias; MTP copies of
                                    embedding and head have no gradient of
                                    their own: it is in the shared tensor's)
    adamw_losses    [10]            total_loss before each of ten steps of
                                    torch.optim.AdamW: lr 1e-3, betas (0.9,
                                    0.95), eps 1e-8, weight decay 0.1 on
                                    parameters with ndim >= 2 (the embedding
                                    too), 0 on the others; the same batch each
                                    step, no clipping. Experts that got no
                                    token have gradient zero and still decay.

What the MTP reference computes (`transformers.modeling_layers.MtpModel`), for
module k = 1..K and row i = 0..t-k-1, with 0-based positions:

    h^0_i  = the trunk's state at position i AFTER the final norm
             (`last_hidden_state`, what the head reads)
    e_i    = embed_tokens(input_ids[i + k])           the trunk's embedding
    x_i    = eh_proj( concat( enorm(e_i), hnorm(h^{k-1}_i) ) )
             embedding first, hidden state second; eh_proj [d, 2d], no bias
    y_i    = decoder layer (MLA + MoE, whatever first_k_dense_replace says)
             over rows 0..i, causal, RoPE at the absolute position of the
             EMBEDDED token, i + k (only differences of positions enter the
             scores, so i, i + k give the same up to rounding)
    h^k_i  = shared_head.norm(y_i)                    eps rms_norm_eps
    logits = lm_head(h^k_i)                           the trunk's head;
             row i predicts input_ids[i + k + 1], the last row has no label

    h^k AFTER shared_head.norm is what module k+1 takes as its hidden state.

Published keys of module k: `model.layers.{num_hidden_layers + k - 1}.` +
`enorm.weight`, `hnorm.weight`, `eh_proj.weight`, the decoder layer's keys,
`shared_head.norm.weight`, and, as redundant copies that loaders ignore,
`embed_tokens.weight`, `shared_head.head.weight` (present in v3_mtp1 only).
transformers registers MTP keys to be ignored for layer 61 alone (DeepSeek-V3's
own depth), so this script registers the depth of its tiny models.

Every configuration is checked before it is written: two runs give the same
bits; weights perturbed by 1e-6 relative change logits, gradients and all ten
losses by little (no router tie sits near a decision), else the next seed is
tried; the drafts of `MtpModel.forward` with its cache equal ours.
"""

import argparse
import json
import math
import re
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

MTP_WEIGHT = 0.3
STEPS = 10
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "crates/minke-model/tests/vectors"

# --------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": 96,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
# What published V3 folders carry beside it and transformers does not read.
V3_PUBLISHED = {
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "transformers_version": "4.33.1",
}
V2 = {
    **{k: v for k, v in V3.items() if k != "num_nextn_predict_layers"},
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
    "topk_method": "greedy",
    "bos_token_id": 2,
    "eos_token_id": 3,
}
V2_PUBLISHED = {
    **{k: v for k, v in V3_PUBLISHED.items() if k != "topk_method"},
    "scoring_func": "softmax",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 96,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
DENSE = {
    **{k: v for k, v in LLAMA.items() if k not in ("mlp_bias", "attention_bias")},
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 48,
}
LLAMA_SMALL = {**DENSE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MISTRAL = {**DENSE, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {**DENSE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**DENSE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GEMMA2 = {
    **{k: v for k, v in DENSE.items() if k not in ("hidden_act", "tie_word_embeddings", "rope_scaling")},
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": None,  # a padding row would get no gradient
}
GEMMA3 = {
    **GEMMA2,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
}


def case(base, tokens=40, form="transformers", bias=(-0.3, 0.3), copies=False, **changes):
    """One configuration.

    tokens: t. form: "published" or "transformers" config.json. bias: range of
    e_score_correction_bias. copies: write the redundant MTP copies.
    """
    extra = {}
    if form == "published":
        extra = {"deepseek_v3": V3_PUBLISHED, "deepseek_v2": V2_PUBLISHED}.get(base["model_type"], {})
    return {
        "config": {**base, **extra, **changes},
        "tokens": tokens,
        "form": form,
        "bias": bias,
        "copies": copies,
    }


def yarn(**changes):
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
        **changes,
    }


CASES = {
    # no query compression, one group, everything plain
    "v3_plain": case(V3, num_hidden_layers=3, first_k_dense_replace=2),
    # as published: query compression, groups, scale; every choice score is
    # negative, so masking groups with 0 instead of -inf would show
    "v3_groups_published": case(
        V3,
        tokens=70,
        form="published",
        bias=(-1.5, -1.05),
        q_lora_rank=24,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
    ),
    # yarn exactly as V3 publishes it (mscale = mscale_all_dim)
    "v3_yarn_published": case(
        V3,
        tokens=150,
        form="published",
        q_lora_rank=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=3,
        routed_scaling_factor=2.5,
        qk_rope_head_dim=16,
        max_position_embeddings=163840,
        rope_scaling=yarn(mscale=1.0, mscale_all_dim=1.0),
    ),
    # yarn under rope_parameters, mscale != mscale_all_dim: cos and sin scaled too
    "v3_yarn_parameters": case(
        V3,
        tokens=70,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        norm_topk_prob=False,
        routed_scaling_factor=1.5,
        max_position_embeddings=4096,
        rope_theta=100.0,  # with these sizes every setting of yarn moves a frequency
        rope_scaling=yarn(
            factor=8.0,
            mscale=1.2,
            mscale_all_dim=0.6,
            beta_fast=24,
            beta_slow=2,
            original_max_position_embeddings=512,
        ),
    ),
    # half-split rope, unnormalised weights, tied head
    "v3_halves_tied": case(V3, rope_interleave=False, norm_topk_prob=False, tie_word_embeddings=True),
    # the same in published form with query compression (no dense layer)
    "v3_tied_all_moe": case(
        V3, form="published", q_lora_rank=20, tie_word_embeddings=True, first_k_dense_replace=0, n_shared_experts=2
    ),
    # sizes that divide nothing
    "v3_odd": case(
        V3,
        tokens=37,
        hidden_size=40,
        intermediate_size=52,
        moe_intermediate_size=18,
        num_attention_heads=3,
        num_key_value_heads=3,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=14,
        kv_lora_rank=20,
        q_lora_rank=12,
        n_routed_experts=5,
        num_experts_per_tok=3,
        routed_scaling_factor=1.7,
        vocab_size=101,
        rms_norm_eps=1e-2,  # large: shows that q_a and kv_a norms keep 1e-6
    ),
    # V2-Lite: softmax scores, greedy, yarn with mscale_all_dim 0.707
    "v2_greedy_yarn_published": case(
        V2,
        tokens=70,
        form="published",
        num_experts_per_tok=3,
        max_position_embeddings=163840,
        rope_scaling=yarn(mscale=0.707, mscale_all_dim=0.707),
    ),
    "v2_greedy_qlora_tied": case(
        V2, q_lora_rank=24, tie_word_embeddings=True, routed_scaling_factor=2.0, n_shared_experts=1
    ),
    # V2: group maximum, groups limited, scaled
    "v2_group_limited_published": case(
        V2,
        form="published",
        topk_method="group_limited_greedy",
        q_lora_rank=24,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        routed_scaling_factor=4.0,
        first_k_dense_replace=0,
    ),
    # biases everywhere, llama3 rope whose three regions all have a frequency
    "llama_biases_llama3": case(
        LLAMA_SMALL,
        tokens=50,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=4096,
        rope_theta=1000.0,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
    ),
    # a window of 24 on all layers, head width of its own
    "mistral_window": case(
        MISTRAL, tokens=70, form="published", num_key_value_heads=2, head_dim=16, sliding_window=24
    ),
    # biases on q, k, v; the last layers slide
    "qwen2_window_tied": case(
        QWEN2,
        tokens=70,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=17,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen2_published_yarn": case(
        QWEN2,
        tokens=50,
        form="published",
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=2,
        max_position_embeddings=4096,
        rope_theta=1000.0,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 1024, "type": "yarn"},
    ),
    # norms of heads, biases, linear rope, one sliding layer by name
    "qwen3_biases_window": case(
        QWEN3,
        tokens=70,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=33,
        layer_types=["sliding_attention", "full_attention"],
        rms_norm_eps=1e-2,
        rope_scaling={"factor": 2.5, "rope_type": "linear"},
    ),
    "qwen3_published_tied": case(QWEN3, form="published", tie_word_embeddings=True),
    # layers 1 and 3 have experts by the step, of which 3 is excepted
    "qwen3_moe_steps": case(
        QWEN3_MOE,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=21,
    ),
    "qwen3_moe_published": case(QWEN3_MOE, form="published", norm_topk_prob=False, attention_bias=True),
    # soft caps low enough to bend, windows on every other layer
    "gemma2_caps": case(
        GEMMA2,
        tokens=70,
        form="published",
        num_hidden_layers=3,
        sliding_window=19,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=9,
    ),
    # both ropes, the global one scaled; pattern of three
    "gemma3_published": case(
        GEMMA3,
        tokens=70,
        form="published",
        num_hidden_layers=4,
        sliding_window=23,
        sliding_window_pattern=3,
        rope_theta=500.0,
        rope_local_base_freq=50.0,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    ),
    "gemma3_biases_cap": case(
        GEMMA3,
        tokens=50,
        attention_bias=True,
        final_logit_softcapping=2.5,
        sliding_window=12,
        layer_types=["full_attention", "sliding_attention"],
        tie_word_embeddings=False,
        rms_norm_eps=1e-2,
    ),
    "llama_mha_tied": case(LLAMA, form="published"),
    "llama_gqa": case(
        LLAMA, tokens=70, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, rms_norm_eps=1e-2
    ),
    # one MTP module, published form with the redundant copies, query compression
    "v3_mtp1": case(
        V3,
        form="published",
        copies=True,
        q_lora_rank=16,
        num_nextn_predict_layers=1,
        n_routed_experts=4,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-2,
    ),
    # two chained modules, yarn, groups
    "v3_mtp2": case(
        V3,
        tokens=70,
        num_nextn_predict_layers=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        max_position_embeddings=163840,
        rope_scaling=yarn(mscale=1.0, mscale_all_dim=1.0),
    ),
}

# --------------------------------------------------------------------------
# Weights and loading
# --------------------------------------------------------------------------


def published_shapes(config, copies):
    """{published key: shape}: transformers' own save, MTP layers appended."""
    mtp = getattr(config, "num_nextn_predict_layers", 0) or 0
    deep = type(config).from_dict({**config.to_dict(), "num_hidden_layers": config.num_hidden_layers + mtp})
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(deep, dtype=torch.float32).save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    d, w = config.hidden_size, config.vocab_size
    for k in range(mtp):
        prefix = f"model.layers.{config.num_hidden_layers + k}."
        shapes[prefix + "enorm.weight"] = (d,)
        shapes[prefix + "hnorm.weight"] = (d,)
        shapes[prefix + "eh_proj.weight"] = (d, 2 * d)
        shapes[prefix + "shared_head.norm.weight"] = (d,)
        if copies:
            shapes[prefix + "embed_tokens.weight"] = (w, d)
            shapes[prefix + "shared_head.head.weight"] = (w, d)
    return shapes


def random_weights(shapes, config, bias_range, seed):
    """Random f32 weights that keep activations and logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key in sorted(shapes):
        shape = shapes[key]
        if key.endswith("e_score_correction_bias"):
            low, high = bias_range
            value = low + (high - low) * torch.rand(shape, generator=generator)
        elif key.endswith(".bias"):
            value = 0.5 * torch.randn(shape, generator=generator)
        elif len(shape) == 1:
            low = -0.4 if config.model_type.startswith("gemma") else 0.6
            value = low + 0.8 * torch.rand(shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator)
            if key == "model.embed_tokens.weight":
                value *= 1.2 / math.sqrt(shape[1]) if config.tie_word_embeddings else 1.0
            elif key.endswith("mlp.gate.weight"):
                value *= 1.5 / math.sqrt(shape[1])
            else:
                value *= 1.0 / math.sqrt(shape[1])
        weights[key] = value
    for key in weights:
        layer = re.match(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$", key)
        if layer:
            shared = "model.embed_tokens.weight" if layer[1] == "embed_tokens" else "lm_head.weight"
            weights[key] = weights[shared].clone()
    return weights


def write_config(folder, spec):
    """config.json in the form the case asks for; returns transformers' reading of it."""
    path = folder / "config.json"
    path.write_text(json.dumps(spec["config"], indent=2, sort_keys=True) + "\n")
    config = AutoConfig.from_pretrained(folder)
    if spec["form"] == "transformers":
        path.unlink()
        config.save_pretrained(folder)
        text = path.read_text()
        if "rope_parameters" not in json.loads(text):
            raise SystemExit("transformers no longer writes rope_parameters")
        path.write_text(text.rstrip() + "\n")
        config = AutoConfig.from_pretrained(folder)
    return config


class Reference:
    """Main model and MTP modules loaded by transformers from one folder."""

    def __init__(self, folder):
        config = AutoConfig.from_pretrained(folder)
        self.mtp_depth = getattr(config, "num_nextn_predict_layers", 0) or 0
        first = config.num_hidden_layers
        patterns = [rf"model\.layers\.{first + k}\..*" for k in range(self.mtp_depth)]
        DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected = patterns or None
        self.main, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                raise SystemExit(f"{folder}: {kind}: {info[kind]}")
        self.main.eval()
        self.mtp = None
        if self.mtp_depth:
            self.mtp = MtpModel.from_pretrained(self.main).eval()
            self.mtp.config._attn_implementation = "eager"
            self.mtp.config._experts_implementation = "eager"
            assert self.mtp.embed_tokens is self.main.get_input_embeddings()
            assert self.mtp.shared_head is self.main.lm_head

    def parameters(self):
        """[(published key without expert split, parameter)] without duplicates."""
        seen, found = set(), []
        layers = self.main.config.num_hidden_layers
        named = [(name, value) for name, value in self.main.named_parameters()]
        if self.mtp is not None:
            for name, value in self.mtp.layers.named_parameters():
                index, rest = name.split(".", 1)
                rest = rest.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")
                named.append((f"model.layers.{layers + int(index)}.{rest}", value))
        for name, value in named:
            if id(value) not in seen:
                seen.add(id(value))
                found.append((name, value))
        return found

    def run(self, input_ids):
        """Forward; returns logits, hidden states, MTP logits and the losses."""
        b, t = input_ids.shape
        out = self.main(input_ids, output_hidden_states=True, use_cache=False)
        loss = next_token_loss(out.logits, input_ids, 1)
        mtp_logits, mtp_losses = [], []
        state = out.hidden_states[-1]
        for k in range(1, self.mtp_depth + 1):
            rows = t - k
            positions = torch.arange(k, t).unsqueeze(0)
            state = self.mtp.forward_layer(k - 1, state[:, :rows], positions, None, input_ids=input_ids[:, k:])
            mtp_logits.append(self.mtp._project_to_logits(state))
            mtp_losses.append(next_token_loss(mtp_logits[-1], input_ids, k + 1))
        total = loss
        if mtp_losses:
            total = loss + MTP_WEIGHT * torch.stack(mtp_losses).mean()
        return {
            "logits": out.logits,
            "hidden": list(out.hidden_states),
            "loss": loss,
            "mtp_logits": mtp_logits,
            "mtp_losses": mtp_losses,
            "total": total,
        }


def next_token_loss(logits, input_ids, distance):
    """Mean cross entropy of row i against input_ids[i + distance]."""
    labels = input_ids[:, distance:]
    logits = logits[:, : labels.shape[1]]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def split_experts(name, value):
    """{published key: tensor} of one transformers parameter."""
    if name.endswith("mlp.experts.gate_up_proj"):
        prefix, f = name.removesuffix("gate_up_proj"), value.shape[1] // 2
        parts = {}
        for e in range(value.shape[0]):
            parts[f"{prefix}{e}.gate_proj.weight"] = value[e, :f]
            parts[f"{prefix}{e}.up_proj.weight"] = value[e, f:]
        return parts
    if name.endswith("mlp.experts.down_proj"):
        prefix = name.removesuffix("down_proj")
        return {f"{prefix}{e}.down_proj.weight": value[e] for e in range(value.shape[0])}
    return {name: value}


# --------------------------------------------------------------------------
# One case
# --------------------------------------------------------------------------


def compute(folder, input_ids, perturb=0.0):
    """Everything that goes into vectors.safetensors, from the files alone."""
    reference = Reference(folder)
    parameters = reference.parameters()
    if perturb:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, value in parameters:
                value.mul_(1 + perturb * torch.randn(value.shape, generator=generator))
    result = reference.run(input_ids)
    result["total"].backward()
    tensors = {
        "input_ids": input_ids,
        "logits": result["logits"],
        "loss": result["loss"].reshape(1),
        "total_loss": result["total"].reshape(1),
    }
    for j, (logits, loss) in enumerate(zip(result["mtp_logits"], result["mtp_losses"])):
        tensors[f"mtp_logits.{j}"] = logits
        tensors[f"mtp_loss.{j}"] = loss.reshape(1)
    stored = load_file(folder / "model.safetensors")
    expected = {
        key
        for key in stored
        if not key.endswith("e_score_correction_bias")
        and not re.search(r"layers\.\d+\.(embed_tokens|shared_head\.head)\.", key)
    }
    for name, value in parameters:
        for key, part in split_experts(name, value.detach()).items():
            if not perturb and not torch.equal(part, stored[key]):
                raise SystemExit(f"{folder}: {key} is not what transformers loaded")
        for key, part in split_experts(name, value.grad).items():
            tensors[f"grad.{key}"] = part
    if {key[5:] for key in tensors if key.startswith("grad.")} != expected:
        raise SystemExit(f"{folder}: gradients and parameters differ")
    decayed = [value for _, value in parameters if value.ndim >= 2]
    others = [value for _, value in parameters if value.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        total = reference.run(input_ids)["total"]
        losses.append(total.item())
        total.backward()
        optimizer.step()
    tensors["adamw_losses"] = torch.tensor(losses, dtype=torch.float32)
    return tensors


def check_drafts(folder, input_ids):
    """MtpModel.forward with its cache drafts what our rows say."""
    reference = Reference(folder)
    if not reference.mtp_depth:
        return
    with torch.no_grad():
        for n in (5, 33):
            ids = input_ids[:1, : n + 1]
            state = reference.main(ids[:, :n], output_hidden_states=True).hidden_states[-1]
            drafts, draft_logits, _ = reference.mtp(
                ids[:, 1:], state, None, torch.arange(1, n + 1).unsqueeze(0), MtpCache(config=reference.mtp.config)
            )
            ours = reference.run(torch.cat([ids, drafts], dim=1))["mtp_logits"]
            for j, logits in enumerate(ours):
                difference = (logits[:, n - 1] - draft_logits[:, j]).abs().max().item()
                if difference > 1e-5:
                    raise SystemExit(f"{folder}: draft {j} differs by {difference}")


def sensitivity(tensors, perturbed):
    """Largest change of logits and losses (absolute), gradients (of each tensor's largest)."""
    logits = max((tensors[k] - perturbed[k]).abs().max().item() for k in tensors if "logits" in k)
    losses = (tensors["adamw_losses"] - perturbed["adamw_losses"]).abs().max().item()
    grads = max(
        ((tensors[k] - perturbed[k]).abs().max() / tensors[k].abs().max().clamp_min(1e-6)).item()
        for k in tensors
        if k.startswith("grad.")
    )
    return logits, grads, losses


def make(name, spec, out):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = write_config(folder, spec)
        shapes = published_shapes(config, spec["copies"])
        for seed in range(200):
            weights = random_weights(shapes, config, spec["bias"], 1000 + seed)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            generator = torch.Generator().manual_seed(seed)
            input_ids = torch.randint(0, config.vocab_size, (2, spec["tokens"]), generator=generator)
            tensors = compute(folder, input_ids)
            change = sensitivity(tensors, compute(folder, input_ids, perturb=1e-6))
            if change[0] < 5e-5 and change[1] < 5e-5 and change[2] < 2e-5:
                break
        else:
            raise SystemExit(f"{name}: no seed without a router tie near a decision")
        again = compute(folder, input_ids)
        if any(not torch.equal(tensors[key], again[key]) for key in tensors):
            raise SystemExit(f"{name}: two runs differ")
        check_drafts(folder, input_ids)
        for key, value in tensors.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise SystemExit(f"{name}: {key} is not finite")
        metadata = {
            "made_by": "scripts/parity_vectors.py",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "seed": str(seed),
        }
        save_file(tensors, folder / "vectors.safetensors", metadata=metadata)
        target = out / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors", "vectors.safetensors"):
            shutil.copyfile(folder / file, target / file)
    size = sum(file.stat().st_size for file in target.iterdir())
    dead = sum(
        1 for key, value in tensors.items() if key.startswith("grad.") and value.abs().max() == 0
    )
    print(
        f"{name:28} seed {seed:3} bytes {size:8} logits std {tensors['logits'].std():.2f}"
        f" loss {tensors['loss'].item():.4f} -> {tensors['adamw_losses'][-1]:.4f}"
        f" zero grads {dead} sensitivity {change[0]:.1e} {change[1]:.1e} {change[2]:.1e}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="configurations to make (default: all)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in CASES]
    if unknown:
        parser.error(f"unknown configuration {unknown}, expected some of {sorted(CASES)}")
    torch.set_num_threads(1)  # one order of summation
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in arguments.names or CASES:
        make(name, CASES[name], arguments.out)


if __name__ == "__main__":
    main()
