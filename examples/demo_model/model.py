"""The two networks: Llamas small enough to check in, with heads that split over 1, 2 or 4 ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from documents import BEGIN, END, PAD, SPECIAL_TOKENS
from tokenizer import CONTEXT_LENGTH, VOCAB_SIZE
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model's shape and training budget."""

    directory_name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    max_bytes: int  # of model.safetensors
    steps: int
    max_seconds: float  # of training, on whatever device
    peak_learning_rate: float


SPECS: Mapping[str, ModelSpec] = {
    "main": ModelSpec("demo", 256, 768, 6, 12_000_000, steps=4000, max_seconds=160, peak_learning_rate=1.2e-3),
    "draft": ModelSpec("demo-draft", 128, 384, 3, 3_000_000, steps=3000, max_seconds=70, peak_learning_rate=2.5e-3),
}
NUM_HEADS, NUM_KV_HEADS = 8, 4


def build_model(spec: ModelSpec, seed: int) -> LlamaForCausalLM:
    """A fresh model in float32. Raises ValueError if it would be too large for its place in the repository."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(spec))
    num_bytes = 2 * num_parameters(model)  # saved as bfloat16
    if num_bytes > spec.max_bytes:
        raise ValueError(f"{spec.directory_name} would take {num_bytes} bytes; at most {spec.max_bytes}")
    return model


def _config(spec: ModelSpec) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=spec.hidden_size // NUM_HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BEGIN),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )


def num_parameters(model: LlamaForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once


def save_model(model: LlamaForCausalLM, directory: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors in bfloat16; the model stays in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(directory)
