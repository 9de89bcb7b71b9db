"""What is known of an anchor and of a chain, and loading an anchor's files."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import Architecture, describe
from cbd_trl.architectures.axes import axis_length
from cbd_trl.chain.model import stock_model
from cbd_trl.chain.stored_weights import StoredWeights
from cbd_trl.surgery.statistics_file import StoredStatistics
from cbd_trl.surgery.weights import Weights, to_weights
from cbd_trl.utils.model_folders import check_no_code, load_config, load_generation_config, load_tokenizer
from cbd_trl.utils.tokenizer_hash import stored_tokenizer_hash
from cbd_trl.utils.untrusted import reading

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
        tokenizer: hash of the tokenizer stored with it (see `chain.tokenizer_hash`), None where there is none.
        block_map: for each layer the layers of the parent it stands for, None for the source.
        kept_layers: for each layer the one of them that it was cut from, None for the source.
        block_costs: for each layer what letting it stand for its block cost before training, nats per token (`Block`);
            None where that was not measured.
        block_start: token ids in front of each block of text that its layers were chosen, its weights refitted and its
            statistics collected on; empty where the tokenizer begins a text with nothing.
        tokens_seen: tokens it was distilled on.
        losses: name -> value in nats per token, at the end of its training.
        training: the training arguments that matter.
        finished: whether its training reached the end.
        files: file name -> sha256 of every file of the folder.
        repo: `repo_id` and `revision` (a full commit) of the Hub repository that holds the files, None where the
            chain's own folder does (see `chain.pins`).
        path: the folder.
        prepare: brings files of the folder that are not here yet; None where all are (see `chain.hub`).
    """

    name: str
    parent: str | None = None
    shape: dict[str, int] = field(default_factory=dict)
    num_parameters: int = 0
    dtype: str = "float32"
    tokenizer: str | None = None
    block_map: list[list[int]] | None = None
    kept_layers: list[int] | None = None
    block_costs: list[float] | None = None
    block_start: list[int] = field(default_factory=list)
    tokens_seen: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    finished: bool = True
    files: dict[str, str] = field(default_factory=dict, repr=False)
    repo: dict[str, str] | None = None
    path: Path = field(default=Path(), repr=False)
    prepare: "Callable[[Anchor, Sequence[str]], None] | None" = field(default=None, repr=False, compare=False)

    def need(self, *names: str) -> None:
        """Have these files in its folder: whatever reads one calls this first.

        Raises:
            ValueError: a file of a chain on the Hub cannot be fetched or is not what chain.json says.
        """
        if self.prepare is not None:
            self.prepare(self, [name for name in names if name in self.files])

    @property
    def small_files(self) -> list[str]:
        """All but the tensors: config, tokenizer, chat template, generation config."""
        return [name for name in self.files if not name.endswith(".safetensors")]

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
        with reading(self.path / "config.json", "a model that a chain may hold", RESTORE):
            return describe(self._config)

    @cached_property
    def _config(self) -> PretrainedConfig:
        self.need("config.json")
        return load_config(self.path, RESTORE)

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
        self.need(STATISTICS_FILE)
        return self.path / STATISTICS_FILE

    def load_statistics(self) -> StoredStatistics:
        """The same, checked against the model's shape and read when asked for.

        Raises:
            ValueError: none were stored, or of another model.
        """
        architecture = self.architecture()
        stored = StoredStatistics(self.statistics_file)
        sizes = {site.name: axis_length(site.axis, architecture.sizes) for site in architecture.sites}
        norms = {norm.name: axis_length(norm.axis, architecture.sizes) for norm in architecture.cut_output_norms}
        stored.check(sizes, norms)
        return stored

    def load_state_dict(self) -> StoredWeights:
        """The tensors as they are stored, under the model's own keys, each read when it is asked for; a tied head is
        left out.

        Raises:
            ValueError: the files do not hold the tensors that the config says the model has.
        """
        self.need(*weight_files(self.files))
        architecture = self.architecture()
        files = [self.path / name for name in weight_files(self.files)]
        try:
            return StoredWeights(files, architecture.state_shapes, architecture.family.file_names)
        except ValueError as error:
            raise ValueError(f"{error} {RESTORE}") from error

    def load_weights(self) -> Weights:
        """The tensors as surgery sees them (see `surgery.weights`), in the stored dtype or a more precise one, each
        read when it is asked for.

        Raises:
            ValueError: as `load_state_dict`.
        """
        return to_weights(self.load_state_dict(), self.architecture())

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model in eval mode.

        Args:
            dtype: None for the stored one.
        """
        dtype = dtype or getattr(torch, self.dtype)
        model = stock_model(self.architecture().config, self.load_state_dict(), dtype, name_or_path=str(self.path))
        model.generation_config = self.load_generation_config()
        return model

    def load_generation_config(self) -> GenerationConfig:
        """The stored generation config, or what the model config says where none was stored."""
        if "generation_config.json" in self.files:
            self.need("generation_config.json")
            return load_generation_config(self.path, RESTORE)
        return GenerationConfig.from_model_config(self.config())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer stored with it.

        Raises:
            ValueError: none was stored, or it is not the one that chain.json records.
        """
        if "tokenizer_config.json" not in self.files:
            raise ValueError(
                f"{self.path} holds no tokenizer_config.json: the chain was stored without a tokenizer. Build it with "
                "processing_class=tokenizer."
            )
        self.need(*self.small_files)
        self.check_tokenizer()
        return load_tokenizer(self.path, RESTORE)

    def check_no_code(self) -> None:
        """Refuse files that name code (ValueError naming file and field); those that are not here yet pass."""
        check_no_code(self.path, RESTORE)

    def check_tokenizer(self) -> None:
        """Compare the tokenizer's files with the hash of what they mean.

        Raises:
            ValueError: they cannot be read, or mean another tokenizer.
        """
        if stored_tokenizer_hash(self.path, RESTORE) != self.tokenizer:
            raise ValueError(
                f"{self.path} holds another tokenizer than the one whose hash is under `tokenizer` of the anchor "
                f"{self.name!r} in {MANIFEST}. {RESTORE}"
            )


@dataclass(frozen=True)
class Manifest:
    """The whole of chain.json.

    Args:
        model_type: the family's `config.model_type`.
        versions: library -> version that wrote it.
        anchors: largest first.
        checksum: of chain.json, and so of every file of the chain; empty before it is written.
    """

    model_type: str
    versions: dict[str, str]
    anchors: tuple[Anchor, ...]
    checksum: str = ""


def weight_files(files: Mapping[str, str]) -> list[str]:
    """The weight files among an anchor's files, one or several shards."""
    return sorted(name for name in files if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name))
