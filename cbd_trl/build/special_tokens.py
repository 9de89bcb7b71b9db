"""Special tokens and chat template of a chain: set by any of its trainings, applied to all anchors."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cbd_trl.build.arguments import template_record
from cbd_trl.utils.datasets import read_template
from cbd_trl.utils.tokenizers import check_token


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Training arguments that change the tokenizer, as in `SFTTrainer`.

    A chain has one tokenizer, so they hold for every anchor: a target between two anchors must stop where both were
    trained to.

    Args:
        eos_token: ends a text.
        pad_token: pads a batch; None for the tokenizer's, or else `eos_token`.
        chat_template_path: a .jinja file, or a tokenizer whose chat template and end are taken over.
    """

    eos_token: str | None = None
    pad_token: str | None = None
    chat_template_path: str | None = None

    @classmethod
    def of(cls, trainings: Iterable[Mapping[str, Any]]) -> "SpecialTokens":
        """Collect them from the trainings of a chain; a training that leaves a field open takes another's value.

        Args:
            trainings: fields of their arguments.

        Raises:
            ValueError: two trainings set different values.
        """
        trainings, found = list(trainings), {}
        for field in dataclasses.fields(cls):
            values = dict.fromkeys(args[field.name] for args in trainings if args.get(field.name) is not None)
            if len(values) > 1:
                one, other, *_ = values
                raise ValueError(
                    f"The trainings of the chain set {field.name}={one!r} and {field.name}={other!r}. A chain has one "
                    "tokenizer, and a model between two anchors must stop where both were trained to. Set the same in "
                    "the args of all anchors, or in those of the chain alone."
                )
            found[field.name] = next(iter(values), None)
        return cls(**found)

    def record(self) -> dict[str, str | None]:
        """The entries for chain.json."""
        return {**dataclasses.asdict(self), "chat_template_path": template_record(self.chat_template_path)}

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Copy a tokenizer with the chat template, eos and pad tokens that a trainer would set.

        Raises:
            ValueError: a token, or a token of the template, is not in the vocabulary.
        """
        taught = copy.deepcopy(tokenizer)
        if self.eos_token is not None:
            taught.eos_token = check_token(taught, "eos_token", self.eos_token)
        if self.chat_template_path is not None:
            self._render(taught, self.chat_template_path)
        if pad_token := self.pad_token or taught.pad_token or taught.eos_token:
            taught.pad_token = check_token(taught, "pad_token", pad_token)
        return taught

    def _render(self, taught: Any, path: str) -> None:
        if (template := read_template(path)) is not None:
            taught.chat_template = template
            return
        other = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        added = [token.content for token in other.added_tokens_decoder.values()]
        if lacking := [token for token in added if token not in taught.get_vocab()]:
            raise ValueError(
                f"chat_template_path={path!r} brings {len(lacking)} tokens that the chain's tokenizer does not have "
                f"({', '.join(map(repr, lacking[:5]))}), and the anchors are cut from tables without rows for them. "
                "Give the source that tokenizer first (trl.clone_chat_template, or "
                "cbd_trl.bridge.transplant_vocabulary), or name a .jinja file."
            )
        taught.chat_template = other.get_chat_template()
        taught.eos_token = other.eos_token

    def follow(self, model: Any, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()) -> None:
        """Write the tokenizer's special tokens into a model's configs, in place, as a trainer does.

        Additional eos tokens in the generation config are kept. The pad token is left to the trainer unless it was
        set: an embedding does not learn the row of its config's padding token.

        Args:
            model: its config and generation config are changed.
            tokenizer: what `tokenizer` returned.
            ends: further eos ids.
        """
        config, generation = model.config.get_text_config(), model.generation_config
        for role in ("bos_token_id", "pad_token_id") if self.pad_token else ("bos_token_id",):
            if (own := getattr(tokenizer, role)) is not None:
                setattr(config, role, own)
                setattr(generation, role, own)
        there = listed(generation.eos_token_id)
        if (own := tokenizer.eos_token_id) is not None:
            before = listed(config.eos_token_id)
            if self.eos_token is not None or own not in before or own not in there:
                several = isinstance(config.eos_token_id, list) and self.eos_token is None
                config.eos_token_id = [own, *(end for end in before if end != own)] if several else own
            if own not in there:
                generation.eos_token_id = there = [own, *there]
        if further := [end for end in dict.fromkeys(ends) if end not in there]:
            generation.eos_token_id = [*there, *further]


def listed(ids: Any) -> list[int]:
    """Token ids of a config field that holds several, one or none, as a list."""
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]
