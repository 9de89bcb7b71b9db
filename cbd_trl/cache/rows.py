"""The rows of a data set as token ids, exactly as training makes them."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

_READ = ("input_ids", "seq_lengths")


def example_rows(example: Mapping[str, Any]) -> list[np.ndarray]:
    """The rows of an example: itself, or those packed into it.

    Args:
        example: `input_ids`, and `seq_lengths` if several rows lie in it end to end.

    Returns:
        token ids of each row, (n,) int32.
    """
    token_ids = np.asarray(example["input_ids"], np.int32)
    if "seq_lengths" not in example:
        return [token_ids]
    return np.split(token_ids, np.cumsum(np.asarray(example["seq_lengths"], np.int64))[:-1])


def prepared_rows(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: SFTConfig) -> Any:
    """A data set with `input_ids`, made of any SFT format by TRL's own preparation, neither truncated nor packed.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`.
        tokenizer: of the data; None for a data set that has `input_ids`.
        args: of the training.

    Returns:
        a data set of the same kind.

    Raises:
        ValueError: if it is empty, or needs a tokenizer.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("The data set is empty: there is nothing to ask the teacher about. Give one with rows.")
    if "input_ids" in first:
        return dataset.select_columns([name for name in _READ if name in first])
    if tokenizer is None:
        raise ValueError(
            f"The data set has the columns {sorted(first)} and has to be tokenised, but the teacher has no tokenizer "
            "with it. Pass `processing_class`."
        )
    own = copy.copy(args)
    # Rows are truncated by `token_rows`, which unlike TRL keeps those whose scored tokens are all cut off: packed ones
    # are trained beside others. What else is changed has no part in the preparation.
    changes: dict[str, Any] = {"packing": False, "padding_free": False, "max_length": None, "max_steps": 1}
    changes |= {"shuffle_dataset": False, "report_to": [], "push_to_hub": False, "eval_strategy": "no"}
    changes |= {
        "load_best_model_at_end": False,
        "model_init_kwargs": None,
        "torch_compile": False,
        "gradient_checkpointing": False,
    }
    for name, value in changes.items():
        setattr(own, name, value)
    # The preparation reads the tokenizer alone. A model of no size keeps TRL's hands off the teacher, whose forward
    # and config it would change.
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1)
    )
    trainer = SFTTrainer(model, own, train_dataset=dataset, processing_class=copy.deepcopy(tokenizer))
    prepared: Any = trainer.train_dataset
    return prepared.select_columns(["input_ids"])


def token_rows(dataset: Any, args: SFTConfig) -> Iterator[np.ndarray]:
    """Token ids of each row that has something to predict, truncated as in training.

    Args:
        dataset: with `input_ids`.
        args: of the training.

    Yields:
        (n,) int32 with n >= 2.
    """
    window = _window(args)
    for example in dataset:
        for row in example_rows(example):
            row = row[window]
            if len(row) > 1:
                yield row


def _window(args: SFTConfig) -> slice:
    options: Any = args.dataset_kwargs or {}  # a string on the command line, a dict once parsed
    prepared = bool(options.get("skip_prepare_dataset"))
    if args.max_length is None or prepared:
        return slice(None)
    # Packing cuts the end off whatever the mode.
    keep_end = args.truncation_mode == "keep_end" and not args.packing
    return slice(-args.max_length, None) if keep_end else slice(args.max_length)
