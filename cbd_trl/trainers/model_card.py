"""The card that is saved beside a distilled model."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from cbd_trl.names import readable_name
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.projectors import without_projectors

_TEXT = """---
{data}
---

# {title}

A language model distilled with `cbd_trl.{trainer}`{dataset}.

| | |
|---|---|
| student | {student} |
| teacher | {teacher} |
| data | {data_text} |
| loss | {loss} |
| hybrid steps | {hybrid} |
| tokens seen | {tokens:,} |
{results}
```python
from transformers import pipeline

generator = pipeline("text-generation", model="{model_id}")
print(generator("Once upon a time")[0]["generated_text"])
```
"""

# Logged terms, by what they are called on the card. A unit only where it is the same for every divergence and weight.
_RESULTS = {
    "loss": "loss",
    "kd": "divergence from the teacher",
    "ce": "cross-entropy (nats)",
    "hidden": "distance of the layers (no unit)",
    "teacher_ce": "cross-entropy of the teacher (nats)",
    "unaligned": "share that the teacher has no tokens for",
}


def describe_model(model: nn.Module, name: str | None) -> str:
    """Name a model for a reader: never by a path that only exists on this machine.

    Args:
        model: any model.
        name: path or Hub id it came from; None or 'None' for a model made in memory.

    Returns:
        such as "`Qwen/Qwen3-4B` (Qwen3ForCausalLM, 4,022,468,096 parameters)".
    """
    # A checkpoint's card is written while the projectors are still there.
    parameters = without_projectors(dict(model.named_parameters())).values()
    size = f"{type(model).__name__}, {sum(getattr(p, 'ds_numel', p.numel()) for p in parameters):,} parameters"
    label = readable_name(name)
    return f"`{label}` ({size})" if label else f"a model made in memory ({size})"


def describe_loss(args: DistillConfig) -> str:
    """The objective in one line.

    Args:
        args: of the run.

    Returns:
        such as "1 x forward_kl (temperature 2) + 0.5 x cross-entropy".
    """
    hidden = f"{'normalised squared' if args.hidden_loss == 'mse' else 'cosine'} distance of the layers"
    names = {
        "kd": args.kd_text,
        "ce": "cross-entropy",
        "hidden": f"mean {hidden}" + (" through learned projectors" if args.hidden_projector else ""),
    }
    weights = {
        term: f"{how.start:g}" + ("" if how.shape == "constant" else f" to {how.end:g} ({how.shape})")
        for term, how in args.schedules().items()
        if how.highest
    }
    return " + ".join(f"{weight} x {names[term]}" for term, weight in weights.items())


def describe_results(history: Sequence[Mapping[str, Any]], last_step: int | None = None) -> str:
    """The last losses of training and of every evaluation set, as a table.

    Args:
        history: log entries of the run, in order.
        last_step: of the model that is kept, where it is not the last one; later entries are left out.

    Returns:
        Markdown between blank lines; empty if nothing was logged.
    """
    columns: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for entry in history:
        for key in entry:
            prefix = key.removesuffix("loss")
            known = prefix == "" or (prefix.startswith("eval_") and prefix != key)
            if known and (last_step is None or entry.get("step", 0) <= last_step):
                columns[prefix] = (f"{prefix.removesuffix('_') or 'training'}, step {entry.get('step', 0):,}", entry)
    if not columns:
        return ""
    lines = ["| per token | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for name, text in _RESULTS.items():
        values = [entry.get(f"{prefix}{name}") for prefix, (_, entry) in columns.items()]
        if any(value is not None for value in values):
            cells = ("" if value is None else f"{value:.4g}" for value in values)
            lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n" + "\n".join(lines) + "\n"


def distillation_card(
    *,
    trainer: str,
    title: str,
    hub_model_id: str | None,
    dataset: str | None,
    student: str,
    teacher: str,
    base_model: str | None,
    args: DistillConfig,
    tokens: int,
    tags: list[str],
    results: str,
) -> ModelCard:
    """The card of a distilled model.

    Args:
        trainer: name of the trainer.
        title: name of the model.
        hub_model_id: where it is pushed, if anywhere.
        dataset: Hub id of the training data, if known.
        student: from `describe_model`.
        teacher: from `describe_model`.
        base_model: Hub id of the student, if it came from there.
        args: of the run.
        tokens: tokens seen in training.
        tags: of the card.
        results: from `describe_results`.

    Returns:
        a card ready to save.
    """
    data: dict[str, Any] = {"library_name": "transformers", "model_name": title, "tags": tags}
    if base_model:
        data["base_model"] = base_model
    if dataset:
        data["datasets"] = dataset
    swap = args.swap_probability or 0
    return ModelCard(
        _TEXT.format(
            data=ModelCardData(**data).to_yaml().strip(),
            trainer=trainer,
            title=title,
            dataset=f" on `{dataset}`" if dataset else "",
            student=student,
            teacher=teacher,
            data_text=f"`{dataset}`" if dataset else "not named",
            loss=describe_loss(args),
            hybrid=f"{swap:.0%} of the steps" if swap else "none",
            tokens=tokens,
            results=results,
            model_id=hub_model_id or title,
        )
    )
