#!/usr/bin/env bash
# torch 2.13.0: torch.nn.attention.bias.causal_lower_right(q, kv) stands for a mask that flash
# attention applies without having it; but making the object allocates more than that, on the host,
# that nothing ever reads. For a piece of 8,192 tokens after 122,880 others that is 8 GiB a call.
# Expected: an object of a few hundred bytes that knows two lengths.
# Seen: a bias for 1,024 × 4,096 holds a storage of 33,554,432 bytes, 8 for each pair, and is used
# alike when it is made for 0 × 0 and given its two lengths afterwards.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy > "$folder/pip.log" 2>&1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

bias = causal_lower_right(1024, 4096)
with torch._C.DisableTorchFunctionSubclass():
    held = bias.untyped_storage().nbytes()
print(held)
assert held == 8 * 1024 * 4096, held
query, key, value = (torch.randn(1, 2, tokens, 16) for tokens in (3, 7, 7))
small = causal_lower_right(0, 0)
small.seq_len_q, small.seq_len_kv = 3, 7
expected = scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(3, 7))
assert torch.equal(scaled_dot_product_attention(query, key, value, attn_mask=small), expected)
PYTHON
