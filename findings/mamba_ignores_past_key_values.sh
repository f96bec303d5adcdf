#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: MambaForCausalLM calls its cache `cache_params`.
# Handed one as `past_key_values`, the argument of every other decoder, it runs without a word,
# and leaves that cache empty: it went into **kwargs, and a cache of the model's own took its place.
# A decode loop that passes its cache by the usual name so decodes every token without a past.
# Expected: the cache is filled, or a TypeError names the argument.
# Seen: after a prompt of 8 tokens the cache given as past_key_values holds 0 bytes of state, the one
# given as cache_params holds 2,560 (4 × 64 of convolution, 6 × 64 of SSM, in float32); no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 > "$folder/pip.log" 2>&1
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig

warnings.simplefilter("error")
config = MambaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=6, conv_kernel=4, expand=2
)
model = AutoModelForCausalLM.from_config(config).eval()
held = {}
for name in ("past_key_values", "cache_params"):
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.arange(1, 9)[None], use_cache=True, **{name: cache})
    values = [vars(layer) for layer in cache.layers]
    held[name] = 0
    for value in values:
        if isinstance(value, dict | list | tuple):
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, torch.Tensor):
            held[name] += value.untyped_storage().nbytes()
print(held)
assert held == {"past_key_values": 0, "cache_params": 2560}, held
PYTHON
