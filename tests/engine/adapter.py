"""A LoRA adapter for the default model, as peft saves one: random, and strong enough to change every answer."""

from __future__ import annotations

import json
from pathlib import Path

RANK = 8
LAYERS, HIDDEN = 30, 576
"""Of SmolLM2-135M."""


def make_adapter(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=draw) / HIDDEN**0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, RANK, generator=draw)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
