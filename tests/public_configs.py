"""Configs of public checkpoints, as published, in folders without weights: enough to plan a chain of them."""

from pathlib import Path
from typing import Any

from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.tokenizer import tiny_tokenizer


def _gpt2(layers: int, width: int, heads: int) -> PretrainedConfig:
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads)


def _pythia(layers: int, width: int, heads: int) -> PretrainedConfig:
    return GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def _qwen3(width: int, ffn: int) -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )


def _qwen25(width: int, ffn: int, layers: int, heads: int) -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )


def _gemma3(width: int, ffn: int, layers: int) -> PretrainedConfig:
    return Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
        max_position_embeddings=32768,
    )


def _smollm2(width: int, ffn: int, layers: int, heads: int) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )


CONFIGS: dict[str, Any] = {
    "openai-community/gpt2-xl": _gpt2(48, 1600, 25),
    "openai-community/gpt2-large": _gpt2(36, 1280, 20),
    "openai-community/gpt2-medium": _gpt2(24, 1024, 16),
    "openai-community/gpt2": _gpt2(12, 768, 12),
    "EleutherAI/pythia-1b": _pythia(16, 2048, 8),
    "EleutherAI/pythia-410m": _pythia(24, 1024, 16),
    "EleutherAI/pythia-160m": _pythia(12, 768, 12),
    "EleutherAI/pythia-70m": _pythia(6, 512, 8),
    "Qwen/Qwen2.5-1.5B": _qwen25(1536, 8960, 28, 12),
    "Qwen/Qwen2.5-0.5B": _qwen25(896, 4864, 24, 14),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072),
    "google/gemma-3-1b-pt": _gemma3(1152, 6912, 26),
    "google/gemma-3-270m": _gemma3(640, 2048, 18),
    "HuggingFaceTB/SmolLM2-360M": _smollm2(960, 2560, 32, 15),
    "HuggingFaceTB/SmolLM2-135M": _smollm2(576, 1536, 30, 9),
}


def save_config(name: str, folder: Path) -> Path:
    """Write the config of a public checkpoint, and a tokenizer, into a folder; returns it.

    Args:
        name: one of `CONFIGS`.
        folder: where model folders go.
    """
    place = folder / name.split("/")[-1]
    CONFIGS[name].save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place
