"""Makes a checkpoint of Llama-2-7B's shape with random bf16 weights, 13.5 GB on disk, a shard at a time.

python benchmarks/large_model.py DIR [--layers 32]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, WIDTH, HEADS, VOCABULARY, LAYERS = 4096, 11008, 32, 32000, 32


def make_large_model(folder: Path, layers: int = LAYERS, device: str = "cpu") -> Path:
    """Write the model into ``folder``, unless it is there; ``device`` draws the numbers."""
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return drawn.normal_(0, 0.02, generator=generator).cpu()

    def block(index: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{index}."
        sizes = {
            **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
            "mlp.gate_proj": (WIDTH, HIDDEN),
            "mlp.up_proj": (WIDTH, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDTH),
        }
        norms = {f"{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in NORMS}
        return {prefix + name: t for name, t in norms.items()} | {
            f"{prefix}{name}.weight": matrix(*size) for name, size in sizes.items()
        }

    ends = {
        "model.embed_tokens.weight": lambda: matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": lambda: matrix(VOCABULARY, HIDDEN),
    }
    shards = [
        lambda: (
            {n: make() for n, make in ends.items()} | {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
        )
    ]
    shards += [lambda index=index: block(index) for index in range(layers)]
    places: dict[str, str] = {}
    for number, make in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = make()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return folder


NORMS = ("input_layernorm", "post_attention_layernorm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    make_large_model(arguments.folder, arguments.layers)
