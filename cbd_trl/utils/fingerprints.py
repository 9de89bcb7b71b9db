"""Short names of a tokenizer and of a teacher: equal where their predictions can stand in one cache."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

# What a config says about files, libraries or text generation, and not about the next token's distribution.
_NOT_THE_FUNCTION = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "cbd_trl",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}
_SAMPLE = 8


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the vocabulary, special and added tokens included.

    The roles of special tokens are left out: training may give a tokenizer its pad or eos token.

    Args:
        tokenizer: of the data.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def teacher_fingerprint(model: Any) -> str:
    """sha256 of a model's config and of some values of each of its parameters.

    Two models that were trained apart differ in almost every value; reading a few of each matrix tells them apart in
    no time.

    Args:
        model: a causal LM.

    Returns:
        64 hexadecimal digits.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_FUNCTION}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]]).float().cpu()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
