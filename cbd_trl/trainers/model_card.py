"""Write the card beside a distilled model."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cbd_trl.cards.card import code, evaluation_prefix, losses_table, plain, render_card, usage_lines
from cbd_trl.cards.metadata import card_metadata, license_sentence
from cbd_trl.cards.origin import Origin
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.hidden_states import without_projectors
from cbd_trl.utils.formatting import readable_name


def describe_model(model: nn.Module, name: str | None) -> str:
    """Describe a model for a reader: never by a path that only exists on this machine.

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
    return f"{code(label)} ({size})" if label else f"a model made in memory ({size})"


def describe_loss(args: DistillConfig) -> str:
    """Write the objective in one line.

    Args:
        args: of the run.

    Returns:
        such as "1 x forward_kl (temperature 2) + 0.5 x cross-entropy".
    """
    hidden = f"{'normalized squared' if args.hidden_loss == 'mse' else 'cosine'} distance of the layers"
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
    """Tabulate the last losses of training and of every evaluation set.

    Args:
        history: log entries of the run, in order.
        last_step: of the model that is kept, where it is not the last one; later entries are left out.

    Returns:
        Markdown; empty if nothing was logged.
    """
    columns: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for entry in history:
        for key in entry:
            prefix, step = evaluation_prefix(key), entry.get("step", 0)
            if prefix is not None and (last_step is None or step <= last_step):
                columns[prefix] = (f"{plain(prefix.removesuffix('_')) or 'training'}, step {step:,}", entry)
    return losses_table(columns)


def distillation_card(
    *,
    trainer: str,
    title: str,
    hub_model_id: str | None,
    dataset: str | None,
    student: str,
    teacher: str,
    origin: Origin,
    is_adapter: bool,
    args: DistillConfig,
    tokens: int,
    tags: list[str],
    results: str,
) -> str:
    """Render the card of a distilled model.

    Args:
        trainer: name of the trainer.
        title: name of the model.
        hub_model_id: where it is pushed, if anywhere.
        dataset: Hub id of the training data, if known.
        student: from `describe_model`.
        teacher: from `describe_model`.
        origin: what the student was before.
        is_adapter: whether what is saved is an adapter.
        args: of the run.
        tokens: tokens seen in training.
        tags: of the card.
        results: from `describe_results`.

    Returns:
        the text of its README.md.

    Raises:
        ValueError: a tag is not text.
    """
    # The name of a file may look like an id.
    datasets = [dataset] if dataset and not os.path.exists(dataset) else []
    origins = [] if origin == Origin() else [origin]
    data = card_metadata(
        origins,
        relation="adapter" if is_adapter else "finetune",
        library="peft" if is_adapter else "transformers",
        name=plain(title),
        datasets=datasets,
        tags=tags,
    )
    swap = args.swap_probability or 0
    return render_card(
        data,
        title=plain(title),
        summary=f"{'An adapter of a' if is_adapter else 'A'} language model, distilled with `cbd_trl.{trainer}`.",
        facts={
            "student": student,
            "teacher": teacher,
            "data": code(readable_name(dataset)) if dataset else "not named",
            "loss": describe_loss(args),
            "hybrid steps": f"{swap:.0%} of the steps" if swap else "none",
            "tokens seen": f"{tokens:,}",
        },
        use=usage_lines(hub_model_id or title),
        license=license_sentence(origins),
        sections=[f"## Losses\n\n{results}"] if results else [],
    )
