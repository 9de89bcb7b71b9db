"""One model of a chain: its record in chain.json, and its files, loaded when they are used."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import Architecture, describe
from cbd_trl.architectures.axes import axis_length
from cbd_trl.chain.manifest import MANIFEST, RESTORE, STATISTICS_FILE, AnchorRecord, weight_files
from cbd_trl.chain.model import StoredWeights, stock_model
from cbd_trl.shapes.budget import Budget, ParameterCount
from cbd_trl.surgery.statistics_file import StoredStatistics
from cbd_trl.surgery.weights import Weights, to_weights
from cbd_trl.utils.model_folders import check_no_code, load_config, load_generation_config, load_tokenizer
from cbd_trl.utils.tokenizers import stored_tokenizer_hash
from cbd_trl.utils.untrusted import reading


class Anchor(AnchorRecord):
    """One model of a chain. What is recorded of it are its fields (`AnchorRecord`); its files are read by its methods.

    Attributes:
        path: its folder.
        fetch: brings files of the folder that are not here yet, and checks them; None where all are (see `chain.hub`).
    """

    path: Path = Field(repr=False)
    fetch: Callable[["Anchor", Sequence[str]], None] | None = Field(default=None, repr=False)

    @classmethod
    def of(cls, record: AnchorRecord, path: Path, fetch: Any = None) -> "Anchor":
        """The anchor of a record, with the folder that its files are in."""
        fields = {name: getattr(record, name) for name in AnchorRecord.model_fields}
        return cls(**fields, path=path, fetch=fetch)

    def need(self, *names: str) -> None:
        """Have these files in its folder; whatever reads one calls this first.

        Raises:
            ValueError: a file of a chain on the Hub cannot be fetched or is not what chain.json records.
        """
        if self.fetch is not None:
            self.fetch(self, [name for name in names if name in self.files])

    @property
    def small_files(self) -> list[str]:
        """The names of all files but the tensors: config, tokenizer, chat template, generation config."""
        return [name for name in self.files if not name.endswith(".safetensors")]

    def config(self) -> PretrainedConfig:
        """Load the model's config, which is read once and not to be changed.

        Raises:
            ValueError: config.json cannot be read.
        """
        return self._config

    def architecture(self) -> Architecture:
        """Describe what the model's tensors mean."""
        return self._architecture

    def size(self, budget: type[Budget]) -> int:
        """Compute what it costs in a budget; its parameters are known without its config."""
        return self.num_parameters if budget is ParameterCount else budget.of(self.architecture())

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
        """The file with the moments of its calibration text.

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
        """Open the moments of its calibration text, checked against the model's shape and read when they are used.

        Raises:
            ValueError: none were stored, or of another model.
        """
        architecture = self.architecture()
        stored = StoredStatistics(self.statistics_file)
        sizes = {site.name: axis_length(site.axis, architecture.sizes) for site in architecture.measured_sites}
        norms = {norm.name: axis_length(norm.axis, architecture.sizes) for norm in architecture.cut_output_norms}
        stored.check(sizes, norms)
        return stored

    def load_state_dict(self) -> StoredWeights:
        """Open the tensors as they are stored, under the model's own keys, each read when it is used; a tied head is
        left out.

        Raises:
            ValueError: the files do not hold the tensors that the config implies.
        """
        self.need(*weight_files(self.files))
        architecture = self.architecture()
        files = [self.path / name for name in weight_files(self.files)]
        try:
            family = architecture.family
            return StoredWeights(files, architecture.state_shapes, family.file_names, architecture.files)
        except ValueError as error:
            raise ValueError(f"{error} {RESTORE}") from error

    def load_weights(self) -> Weights:
        """Open the tensors as surgery sees them (see `surgery.weights`), in the stored dtype or a more precise one,
        each read when it is used.

        Raises:
            ValueError: as `load_state_dict`.
        """
        return to_weights(self.load_state_dict(), self.architecture())

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load the model, in eval mode.

        Args:
            dtype: None for the stored one.
        """
        dtype = dtype or getattr(torch, self.dtype)
        model = stock_model(self.architecture().config, self.load_state_dict(), dtype, name_or_path=str(self.path))
        model.generation_config = self.load_generation_config()
        return model

    def load_generation_config(self) -> GenerationConfig:
        """Load the generation config, made from the model config where none was stored."""
        if "generation_config.json" in self.files:
            self.need("generation_config.json")
            return load_generation_config(self.path, RESTORE)
        return GenerationConfig.from_model_config(self.config())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

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
        """Check that no file names code (ValueError naming file and field); those that are not here yet pass."""
        check_no_code(self.path, RESTORE)

    def check_tokenizer(self) -> None:
        """Compare the tokenizer's files with the recorded hash.

        Raises:
            ValueError: they cannot be read, or mean another tokenizer.
        """
        if stored_tokenizer_hash(self.path, RESTORE) != self.tokenizer_sha256:
            raise ValueError(
                f"{self.path} holds another tokenizer than {MANIFEST} records for the anchor {self.name!r} "
                f"(tokenizer_sha256). {RESTORE}"
            )
