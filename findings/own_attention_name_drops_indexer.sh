#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: DeepSeek-V3.2 attends to the tokens that its indexer chose by a
# mask, which its modeling file makes where the attention is called `sdpa`. An
# attention function that is registered under a name of one's own (AttentionInterface.register, as
# transformers' documentation shows it), be it transformers' own sdpa function, gets no such mask:
# the model attends to all tokens, and says nothing.
# Expected: the same logits, for it is the same function, with the same mask function.
# Seen: with an indexer that keeps 4 of 24 tokens the logits differ by more than 0.01 under another
# name; with one that keeps all they are the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 > "$folder/pip.log" 2>&1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

AttentionInterface.register("another_name", sdpa_attention_forward)
AttentionMaskInterface.register("another_name", sdpa_mask)
difference = {}
for kept in (4, 64):
    config = AutoConfig.for_model(
        "deepseek_v32",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=4,
        v_head_dim=12,
        index_topk=kept,
        index_head_dim=16,
        index_n_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    tokens = torch.arange(1, 25)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_attn_implementation("another_name")
        found = model(tokens).logits
    difference[kept] = (found - expected).abs().max().item()
print(difference)
assert difference[4] > 0.01, difference
assert difference[64] < 1e-5, difference
PYTHON
