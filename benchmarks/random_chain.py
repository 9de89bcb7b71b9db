"""Chains of random weights: what building a target costs does not depend on what the weights are."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from cbd_trl.architectures import Architecture, describe
from cbd_trl.architectures.axes import axis_length, tensor_shape
from cbd_trl.chain.chain import STATISTICS_FILE, write_anchor
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.surgery.blocks import blocks_of, spaced_layers
from cbd_trl.surgery.statistics import Statistics
from cbd_trl.surgery.statistics_file import save_statistics
from cbd_trl.utils.tensor_files import TensorFile, save_tensors


def smol(layers: int = 30, width: int = 576, ffn: int = 1536, heads: int = 9) -> PretrainedConfig:
    """The shape of SmolLM2-135M, or a smaller one."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        tie_word_embeddings=True,
    )


def qwen(width: int = 1536, ffn: int = 8960) -> PretrainedConfig:
    """The shape of Qwen2.5-1.5B, or a narrower one."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config.head_dim = 128
    return config


def tiny(layers: int = 6, width: int = 48, ffn: int = 96) -> PretrainedConfig:
    """A shape for trying the benchmark out."""
    config = smol(layers, width, ffn, heads=6)
    config.vocab_size, config.head_dim = 256, 8
    return config


def _random_statistics(architecture: Architecture) -> Iterator[Statistics]:
    """Well-conditioned moments of the right size, site by site."""
    for site in architecture.sites:
        size = axis_length(site.axis, architecture.sizes)
        shared = torch.randn(size, 32) / math.sqrt(size)
        second = (shared @ shared.T).fill_diagonal_(1.0)
        yield Statistics({site.name: torch.zeros(size)}, {site.name: torch.ones(size)}, {site.name: second}, 1)


def write_random_chain(
    folder: Path, configs: Sequence[PretrainedConfig], dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Write anchors of these shapes, largest first.

    Args:
        folder: new.
        configs: one an anchor.
        dtype: of the weights on disk.
        device: that draws them; None for the CPU, which takes a minute for every few billion.
    """
    torch.manual_seed(0)
    above: Architecture | None = None
    parent = None
    for number, config in enumerate(configs):
        architecture = describe(config)
        record = {"name": f"anchor-{number}", "parent": parent}
        if above is not None:
            record["blocks"] = blocks_of(spaced_layers(above.depth, architecture.depth))
        write_anchor(folder, record, _filler(config, architecture, dtype, device))
        above, parent = architecture, record["name"]


def _filler(
    config: PretrainedConfig, architecture: Architecture, dtype: torch.dtype, device: torch.device | None
) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        config.dtype = dtype
        config.save_pretrained(folder)
        weights = {}
        for key, axes in architecture.tensors.items():
            shape = tensor_shape(axes, architecture.sizes)
            weights[key] = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02).cpu()
            if len(axes) == 1 and key.endswith("weight"):
                weights[key] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        del weights
        _save_statistics(architecture, folder / STATISTICS_FILE)

    return fill


def _save_statistics(architecture: Architecture, file: Path) -> None:
    """Write those of the first layer, and the same for each of the others: to pack a large factor takes seconds."""
    first = cut_architecture(architecture, {"num_hidden_layers": 1})
    save_statistics(_random_statistics(first), first, file)
    stored, tensors = TensorFile(file), {}
    for key, tensor in stored.items():
        layer, name = architecture.split_name(key)
        layers = () if layer is None else range(architecture.depth)
        tensors |= {alike: tensor.clone() for alike in [architecture.layer_name(i, name) for i in layers] or [key]}
    save_tensors(tensors, file, stored.metadata)
