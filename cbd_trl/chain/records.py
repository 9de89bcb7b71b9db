"""What is known of an anchor and of a chain, and loading an anchor's files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from cbd_trl.architectures import Architecture, describe
from cbd_trl.architectures.axes import tensor_shape
from cbd_trl.chain.model import build_model
from cbd_trl.chain.stored_weights import StoredWeights
from cbd_trl.surgery.weights import Weights

MANIFEST = "chain.json"
STATISTICS_FILE = "statistics.safetensors"
RESTORE = "Download or copy the chain again, or rebuild it with build_chain."


@dataclass(frozen=True)
class Anchor:
    """One model of a chain, as chain.json records it.

    Args:
        name: name of its folder in the chain.
        parent: name of the anchor it was cut and distilled from, None for the source.
        shape: config fields of the family with their values.
        num_parameters: a tied table counted once.
        dtype: dtype of the weights, such as "float32".
        block_map: for each layer the layers of the parent it stands for, None for the source.
        tokens_seen: tokens it was distilled on.
        losses: name -> value in nats per token, at the end of its training.
        training: the training arguments that matter.
        finished: whether its training reached the end.
        files: file name -> sha256 of every file of the folder.
        path: the folder.
    """

    name: str
    parent: str | None = None
    shape: dict[str, int] = field(default_factory=dict)
    num_parameters: int = 0
    dtype: str = "float32"
    block_map: list[list[int]] | None = None
    tokens_seen: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    finished: bool = True
    files: dict[str, str] = field(default_factory=dict, repr=False)
    path: Path = field(default=Path(), repr=False)

    def config(self) -> PretrainedConfig:
        """The model's config, read once; not to be changed.

        Raises:
            ValueError: config.json cannot be read.
        """
        return self._config

    def architecture(self) -> Architecture:
        """What the model's tensors mean."""
        return self._architecture

    @cached_property
    def _architecture(self) -> Architecture:
        return describe(self._config)

    @cached_property
    def _config(self) -> PretrainedConfig:
        try:
            # Never code from a chain: the families are transformers' own.
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, StrictDataclassError) as error:
            raise ValueError(
                f"{self.path / 'config.json'} cannot be read as a model config ({error}). {RESTORE}"
            ) from error

    @property
    def kept_layers(self) -> list[int] | None:
        """The parent's layers it was cut from: the last of each block. None for the source."""
        return None if self.block_map is None else [block[-1] for block in self.block_map]

    @property
    def statistics_file(self) -> Path:
        """The moments of its calibration text.

        Raises:
            ValueError: none were stored.
        """
        if STATISTICS_FILE not in self.files:
            raise ValueError(
                f"{self.path / STATISTICS_FILE} was not stored with the anchor, and cutting its width needs it. "
                f"{RESTORE}"
            )
        return self.path / STATISTICS_FILE

    def load_state_dict(self) -> Weights:
        """The weights under the model's own keys, in the stored dtype, each read when it is asked for; a tied head is
        left out.

        Raises:
            ValueError: the files do not hold the tensors that the config says the model has.
        """
        architecture = self.architecture()
        shapes = {key: tensor_shape(axes, architecture.sizes) for key, axes in architecture.tensors.items()}
        try:
            return StoredWeights([self.path / name for name in weight_files(self.files)], shapes)
        except ValueError as error:
            raise ValueError(f"{error} {RESTORE}") from error

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model in eval mode.

        Args:
            dtype: None for the stored one.
        """
        dtype = dtype or getattr(torch, self.dtype)
        model = build_model(self.architecture(), self.load_state_dict(), dtype, name_or_path=str(self.path))
        model.generation_config = self.load_generation_config()
        return model

    def load_generation_config(self) -> GenerationConfig:
        """The stored generation config, or what the model config says where none was stored."""
        if "generation_config.json" in self.files:
            return GenerationConfig.from_pretrained(self.path, local_files_only=True)
        return GenerationConfig.from_model_config(self.config())


@dataclass(frozen=True)
class Manifest:
    """The whole of chain.json.

    Args:
        model_type: the family's `config.model_type`.
        versions: library -> version that wrote it.
        anchors: largest first.
    """

    model_type: str
    versions: dict[str, str]
    anchors: tuple[Anchor, ...]


def weight_files(files: Mapping[str, str]) -> list[str]:
    """The weight files among an anchor's files, one or several shards."""
    return sorted(name for name in files if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name))
