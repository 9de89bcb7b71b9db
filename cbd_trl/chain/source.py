"""A model that a chain is made from, wherever it is: in memory, in a folder or on the Hub."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from cbd_trl.architectures import Architecture, architecture_of, describe
from cbd_trl.cards.origin import Origin, cached_commit, origin_of
from cbd_trl.utils.files import sha256_of
from cbd_trl.utils.formatting import readable_name
from cbd_trl.utils.modeling import (
    check_at_hand,
    check_checkpoint,
    check_is_model_folder,
    check_no_adapter,
    check_plain,
    load_causal_lm,
    text_config,
    text_model,
)
from cbd_trl.utils.tensor_files import read_header
from cbd_trl.utils.tokenizers import find_tokenizer, lacks_tokenizer, text_tokenizer, tokenizer_difference

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """Looked at piece by piece, so that nothing big is loaded before everything small is checked.

    Args:
        place: a model, a path or a Hub id.
        revision, token: of a Hub id.
        role: what an error calls it.

    Raises:
        ValueError: it is a PEFT adapter, in memory or in a folder.
        TypeError: it is not a model of transformers.
    """

    place: str | Path | PreTrainedModel
    revision: str | None = None
    token: str | None = None
    role: str = "source"

    def __post_init__(self) -> None:
        if isinstance(self.place, str | Path):
            check_no_adapter(self.place, self.role, revision=self.revision, token=self.token)
        else:
            check_plain(self.place, self.role)

    @property
    def name(self) -> str:
        """Hub id, folder, or the name in the config of a model in memory."""
        # Of a target that is not saved, the name in the config leads to its tokenizer and its card.
        return str(self.place.config._name_or_path if isinstance(self.place, PreTrainedModel) else self.place)

    @property
    def label(self) -> str:
        """Its name for a reader, never a path, or a description where it has none."""
        return readable_name(self.name) or "a model made in memory"

    def weights_sha256(self) -> str | None:
        """Hash the weights of a model in memory, whose name may be empty; None for a path or a Hub id."""
        if not isinstance(self.place, PreTrainedModel):
            return None
        digest = hashlib.sha256()
        for key, tensor in sorted(self.place.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _files_sha256(self) -> str | None:
        """Hash the weights in a folder; None where there are none."""
        if isinstance(self.place, PreTrainedModel) or not (files := sorted(Path(self.place).glob("*.safetensors"))):
            return None
        return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Describe it for chain.json: its name, of a folder with the hash of its weights and never a path, since that
        goes where the chain goes."""
        name = readable_name(self.name) or ""
        if (digest := self._files_sha256()) is not None:
            name += f"@{digest[:16]}"
        return {"source": name, "weights_sha256": self.weights_sha256()}

    @property
    def on_hub(self) -> bool:
        """Whether it is named by a Hub id."""
        return not isinstance(self.place, PreTrainedModel) and not Path(self.place).is_dir()

    def pinned(self) -> "Source":
        """Name the commit that a branch or tag on the Hub is at now; any other source stays as it is.

        Raises:
            ValueError: nothing of that name can be read.
        """
        if not self.on_hub:
            return self
        self.config()
        commit = cached_commit(self.name, self.revision)
        return self if commit is None else dataclasses.replace(self, revision=commit)

    def identity(self) -> tuple[str | None, ...]:
        """What tells it from other models: its id and commit on the Hub, or the hash of its weights."""
        if self.on_hub:
            return str(self.place), self.pinned().revision
        return (self.weights_sha256() or self._files_sha256() or str(Path(self.name).resolve()),)

    def origin(self) -> Origin:
        """Look up what its card records of it, once it was loaded."""
        return origin_of(self.name, self.revision, self.token)

    def config(self) -> PretrainedConfig:
        """Load its config, without the weights; of a multimodal model that of its language model.

        Raises:
            ValueError: nothing of that name can be read.
        """
        if isinstance(self.place, PreTrainedModel):
            return text_config(self.place.config)
        check_is_model_folder(self.place, f"The {self.role} {self.name!r}")
        try:
            config = AutoConfig.from_pretrained(
                self.place, revision=self.revision, token=self.token, trust_remote_code=False
            )
            return text_config(config)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The {self.role} {self.name!r} is not a model folder and could not be fetched from the Hub "
                f"({error}). Give a model, the path of a folder with config.json, or a Hub id."
            ) from error

    def architecture(self) -> Architecture:
        """Describe what its tensors mean, its head tied or not as its weights have it (see `architecture_of`).

        Weights are read only where the config has the head tied and there is one among the tensors all the same.

        Raises:
            ValueError: no chain can be made of it, or a `device_map` offloaded weights of it.
        """
        configured = describe(self.config())
        if isinstance(self.place, PreTrainedModel):
            check_at_hand(self.place, self.role)
            return architecture_of(text_model(self.place))
        if configured.tied and self._has_tensor(f"{configured.family.head}.weight", configured.family.file_names):
            return architecture_of(self.model({"dtype": "auto"}))
        return configured

    def check_weights(self) -> None:
        """Check that the tensors of a folder are those of its config; of a model on the Hub only loading it tells.

        Raises:
            ValueError: see `check_checkpoint`.
        """
        if isinstance(self.place, str | Path) and Path(self.place).is_dir():
            check_checkpoint(self.place, role=self.role)

    def _has_tensor(self, key: str, file_names: Mapping[str, str]) -> bool:
        """Whether its safetensors files list a tensor: those here, or else on the Hub."""
        names: set[str] = set()
        place = str(self.place)
        config = cached_file(place, "config.json", revision=self.revision, token=self.token)
        files = list(Path(config).parent.glob("*.safetensors")) if config else []
        for file in files:
            names |= read_header(file)[0].keys()
        if not files and not Path(place).is_dir():
            # Offline, or in another format: loading it reports what is wrong.
            with suppress(Exception):
                listed = HfApi(token=self.token).get_safetensors_metadata(place, revision=self.revision)
                names |= listed.weight_map.keys()
        return any(f".{file_names.get(name, name)}".endswith(f".{key}") for name in names)

    def own_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer that it was saved with; None where there is none."""
        in_memory = isinstance(self.place, PreTrainedModel)
        return find_tokenizer(self.name, self.revision, local_only=in_memory, token=self.token)

    def tokenizer_or(self, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        """Choose the tokenizer: the one given for it, or else its own.

        Raises:
            ValueError: there is none, or the one given has other ids than the one that the model was saved with.
        """
        given = text_tokenizer(given)
        if given is None:
            return self._tokenizer()
        # A trainer sets the tokens of a tokenizer that it lacks, or that its arguments name.
        given = copy.deepcopy(given)
        own = self.own_tokenizer()
        if own is None:
            return given
        reason = tokenizer_difference(own, given, names=("its own", "the given"), further_tokens="either")
        if reason is not None:
            raise ValueError(
                f"The {self.role} ({self.name!r}) was saved with another tokenizer than the `processing_class` given "
                f"for it: {reason}. Its rows stand for its own tokens. Leave `processing_class` out; for another "
                "tokenizer give the model one with cbd_trl.bridge.transplant_vocabulary, or bridge to a model that "
                "has it (BridgeStep)."
            )
        return given

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            if lacks_tokenizer(self.name):
                raise ValueError("there are no files of one")
            return AutoTokenizer.from_pretrained(
                self.name, revision=self.revision, token=self.token, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"No tokenizer could be loaded from the {self.role} ({self.name!r}: {error}). Pass `processing_class`."
            ) from error

    def model(self, init_kwargs: dict[str, Any] | str | None = None) -> PreTrainedModel:
        """Load the model; from a folder or the Hub in float32 (TRL's default) unless `init_kwargs` has a dtype.

        Of a multimodal model it is the language model, with a warning.

        Raises:
            ValueError: weights are missing, unknown, of another shape or in no safetensors.
        """
        if isinstance(self.place, PreTrainedModel):
            return self._text(self.place)
        given = json.loads(init_kwargs) if isinstance(init_kwargs, str) else (init_kwargs or {})
        options = {"dtype": torch.float32, "revision": self.revision, "token": self.token, **given}
        return self._text(load_causal_lm(self.place, role=self.role, **{**options, "trust_remote_code": False}))

    def _text(self, model: PreTrainedModel) -> PreTrainedModel:
        text = text_model(model)
        if text is not model:
            logger.warning_once(
                f"Of the {self.role} {self.name!r}, a {type(model).__name__}, the language model is taken, a "
                f"{type(text).__name__}: what it has for images and sounds is left out."
            )
        return text
