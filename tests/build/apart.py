"""Random models that play public sizes of one family, and chains of them."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cbd_trl import Chain, chain_from_anchors
from tests.chain.helpers import chain_rows
from tests.surgery.helpers import logits
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

NARROW = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}


def make(folder: Path, anchors: Any, **options: Any) -> Chain:
    """A chain of these models, calibrated on 512 tokens of random words."""
    options = {"dataset": chain_rows(60), "processing_class": tiny_tokenizer(), "calibration_tokens": 512, **options}
    return chain_from_anchors(anchors, output_dir=folder, **options)


def sizes(**lower: Any) -> list[PreTrainedModel]:
    """Two random Llamas; the second one with these config fields besides."""
    return [tiny_model("llama", seed=1), tiny_model("llama", seed=2, **{**NARROW, **lower})]


def differs(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """max |difference of logits| / std."""
    expected = logits(other)
    return float((logits(one) - expected).abs().max() / expected.std())
