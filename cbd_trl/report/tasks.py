"""Score models on tasks of the LM evaluation harness (lm-eval), as probes of a sweep."""

import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.report.sweep import Probe, fingerprint
from cbd_trl.utils.formatting import did_you_mean

# The metric that stands for a task: the first of these that it has, otherwise its own first one.
_PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "perplexity")
# lm-eval's own default: which examples stand in front of a question.
_FEWSHOT_SEED = 1234


def task_probes(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    include_path: Path | str | None = None,
    limit: int | None = None,
    batch_size: int = 4,
) -> list[Probe]:
    """Load tasks and their data by name, so that every mistake is found before a model is measured.

    Args:
        names: tasks, groups and tags of lm-eval. A group counts as one task if it defines a score of its own; the
            tasks of any other group, and of a tag, count each.
        tokenizer: of the models.
        include_path: folder of the user's own task files (YAML), which win over lm-eval's.
        limit: the first examples of each task only; None for all.
        batch_size: rows in one forward pass.

    Returns:
        a probe a task, each measuring {"metric", "value", "stderr", "higher_is_better", "examples", "all": {metric:
        value}}.

    Raises:
        ValueError: lm-eval is not installed, a task is not known, or its data cannot be loaded.
    """
    if not names:
        return []
    _require_lm_eval()
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"There is no folder {include_path} of task files: --include_path names one with YAML files.")
    with _quiet():
        manager = _manager(names, include_path)
        loaded = {name: _load(manager, name) for name in names}
    scored = {name: tasks for requested, each in loaded.items() for name, tasks in _scored(requested, each)}
    return [
        Probe(name, _key(tasks, limit), _measure(name, tasks, tokenizer, limit, batch_size))
        for name, tasks in scored.items()
    ]


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401 - is it there?
    except ImportError as error:
        raise ValueError(
            f"Tasks need the package lm-eval, which is not installed ({error}): pip install 'cbd-trl[eval]', or leave "
            "--tasks out."
        ) from error


def _key(tasks: dict[str, Any], limit: int | None) -> str:
    """Identify all that the scores of tasks depend on: the harness, their files and their examples."""
    parts = [version("lm-eval"), limit]
    for task in tasks["tasks"].values():
        examples = list(itertools.islice(task.eval_docs, limit))
        parts.append(json.dumps([task.dump_config(), examples], sort_keys=True, default=str))
    return fingerprint(*parts)


def _manager(names: Sequence[str], include_path: Path | str | None) -> Any:
    """An index that holds all of the tasks; lm-eval's own, which takes seconds to read, only where it is needed."""
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    if path is not None:
        manager = TaskManager(include_path=path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=path)
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(
                f"--tasks: lm-eval has no task {name!r}{'' if path is None else f', nor has {path}'}."
                f"{did_you_mean(name, manager.all_tasks)} `lm-eval ls tasks` lists what there is; a folder of task "
                "files of your own goes into --include_path."
            )
    return manager


def _load(manager: Any, name: str) -> dict[str, Any]:
    """A task, group or tag, with its data."""
    try:
        loaded = manager.load([name])
    # The harness and the code of a task raise anything: a bad file, a dataset that cannot be loaded.
    except Exception as error:
        raise ValueError(
            f"--tasks: {name} could not be loaded ({type(error).__name__}: {error}). Check that its dataset can "
            "be loaded from here and that its file is valid."
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return dict(loaded)


def _scored(name: str, loaded: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything that has a score of its own, with the tasks it is made of as the harness takes them."""
    if name in loaded["groups"] and loaded["groups"][name].has_aggregation:
        yield name, loaded
        return
    for task in loaded["tasks"]:
        yield task, {"tasks": {task: loaded["tasks"][task]}, "groups": {}, "group_map": {}}


def _measure(
    name: str, tasks: dict[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int | None, batch_size: int
) -> Callable[[PreTrainedModel], dict[str, Any]]:
    def measure(model: PreTrainedModel) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        for task in tasks["tasks"].values():
            # Every model sees the same examples in front of a question.
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        with _quiet():
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            results = evaluate(lm, tasks, limit=limit, log_samples=False, bootstrap_iters=1000)
        return _score(name, results)

    return measure


def _score(name: str, results: Any) -> dict[str, Any]:
    """The harness's results of one task, as a report keeps them."""
    found = {**results["results"], **results.get("groups", {})}[name]
    metrics = {
        key: value
        for key, value in found.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    if not metrics:
        raise ValueError(f"lm-eval gave no number for the task {name}, only {sorted(found)}: it cannot be drawn.")
    names: dict[str, str] = {}
    for key in metrics:
        names.setdefault(key.split(",")[0], key)
    metric = next(metric for metric in (*_PREFERRED, *names) if metric in names)
    stderr = found.get(names[metric].replace(",", "_stderr,", 1))
    higher = results["higher_is_better"].get(name, {}).get(metric)
    counts = results["n-samples"]
    members = [name] if name in counts else list(counts)
    return {
        "metric": metric,
        "value": float(metrics[names[metric]]),
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        "higher_is_better": True if higher is None else bool(higher),
        "examples": sum(int(counts[member]["effective"]) for member in members),
        "all": {key: float(value) for key, value in metrics.items()},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness, whose log and progress bars would bury the one bar of the report."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
