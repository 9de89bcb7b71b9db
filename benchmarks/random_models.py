"""Random models, rows and a tokenizer for them: what a step costs does not depend on what the weights are."""

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

# Ids of the tokenizer's two tokens; rows hold none of them.
PAD, EOS = 0, 1


def two_token_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that is there because trainers want one: the rows are token ids already."""
    words = {"<pad>": PAD, "</s>": EOS}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="</s>")), pad_token="<pad>", eos_token="</s>"
    )


def qwen3(
    layers: int, width: int, ffn: int, groups: int, *, vocabulary: int, queries: int = 2, head: int = 128, tied: bool
) -> PretrainedConfig:
    """A shape of the Qwen3 family.

    Args:
        layers: of the decoder.
        width: of the residual stream.
        ffn: neurons of an MLP.
        groups: key/value heads.
        vocabulary: rows of the table.
        queries: query heads of a group.
        head: size of a head.
        tied: whether the head is the table.
    """
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=groups * queries,
        num_key_value_heads=groups,
        head_dim=head,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, attention: str | None = None
) -> PreTrainedModel:
    """A model with random weights, made on the device, where billions of weights take seconds.

    Args:
        config: its shape.
        dtype: of the weights.
        device: of the weights.
        attention: as `attn_implementation`.
    """
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model


def random_rows(count: int, lengths: tuple[int, int], vocabulary: int, seed: int = 0) -> Dataset:
    """Rows of random tokens.

    Args:
        count: rows.
        lengths: of the shortest row and of the longest, evenly distributed between.
        vocabulary: ids are below it.
        seed: of lengths and tokens.

    Returns:
        a dataset with the column input_ids.
    """
    draw = random.Random(seed)
    return Dataset.from_dict(
        {"input_ids": [draw.choices(range(2, vocabulary), k=draw.randint(*lengths)) for _ in range(count)]}
    )
