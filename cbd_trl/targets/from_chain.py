"""A model of any size between two anchors, without a teacher or a forward pass."""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from cbd_trl.architectures import describe
from cbd_trl.cards.card import save_card
from cbd_trl.chain.cards import chain_label, copy_picture
from cbd_trl.chain.chain import Anchor, Chain
from cbd_trl.chain.model import build_model
from cbd_trl.surgery.weights import LazyWeights, Weights
from cbd_trl.targets.calibrate import choose_plan
from cbd_trl.targets.card import target_card
from cbd_trl.targets.operators import OPERATORS, default_alpha
from cbd_trl.targets.pair import Pair, Plan
from cbd_trl.targets.request import ANCHOR, Request, Target, find_target, target_dtype
from cbd_trl.utils.blocks import TokenBlocks, calibration_length, token_blocks
from cbd_trl.utils.datasets import sft_dataset
from cbd_trl.utils.formatting import anchor_name

CALIBRATION_TOKENS = 4096


def from_chain(
    chain: str | Path | Chain,
    num_parameters: float | None = None,
    *,
    config: Mapping[str, int] | None = None,
    operator: str = "nested",
    alpha: float | None = None,
    calibration_dataset: Dataset | None = None,
    dtype: torch.dtype | str | None = None,
    tolerance: float = 0.03,
    save_directory: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PreTrainedModel:
    """Make a stock transformers model of any size between the largest and the smallest anchor of a chain.

    Args:
        chain: a chain, its folder, or its Hub id.
        num_parameters: size wanted (a tied table counts once); the nearest reachable shape on the line between the
            two neighbouring anchors is made.
        config: config fields to fix, for example `{"num_hidden_layers": 20}`; `num_parameters`, or else the line,
            decides the rest. Depths that leave the pattern of layers that llama.cpp has built in (SmolLM3, Gemma 2
            and 3; docs/guides/export.md) are made only when they are asked for here.
        operator: "nested" (upper blocks for depth, least-squares cut mixed with the lower anchor for width), "patch"
            (blocks only), "slice" (upper anchor alone), "expand" (lower anchor alone, grown exactly) or "linear"
            (arXiv 2605.07783).
        alpha: weight of the lower anchor where the operator mixes, 0 to 1; None: from the size.
        calibration_dataset: text in any SFT format on which blocks and alpha are chosen by measured loss, never worse
            there than the better of `expand` and `slice`; not that of the anchors, on which the smaller one looks too
            good. None: no data and no forward pass.
        dtype: of the result; None: that of the anchors.
        tolerance: largest relative distance from `num_parameters`.
        save_directory: where to save model, tokenizer, chat template, generation config and provenance. Without it
            the model is nowhere to be loaded from: trainers find its tokenizer, but an adapter trained on it has no
            base that can be loaded, and trainers that reload a reference model by name (GRPO with beta > 0, DPO)
            refuse it.
        revision: of a chain on the Hub: branch, tag or commit.
        token: for a chain on the Hub that is private or gated.

    Returns:
        The model in eval mode; `model.config.cbd_trl` says what it was made from. At an anchor's own shape it is that
        anchor (see `find_target`).

    Raises:
        ValueError: a size, shape, operator or alpha that cannot be had; the message says what can.
    """
    request = Request(num_parameters, config, operator, alpha, tolerance)
    directory = None if save_directory is None else Path(save_directory).expanduser().resolve()
    if directory is not None:
        check_replaceable(directory)
    opened = chain
    if not isinstance(chain, Chain):
        # What is used is verified below; the other anchors are not read at all.
        chain = Chain.from_pretrained(chain, revision=revision, token=token, verify=False)
    target = find_target(chain, request)
    with nullcontext() if opened is chain else _verified(chain, target):
        tokens = None if calibration_dataset is None else calibration_tokens(target, calibration_dataset)
        model = make_model(chain, request, target, tokens, dtype)
        if directory is None and target.operator != ANCHOR:
            _name_unsaved(model, chain)
    if directory is not None:
        save_model(model, chain, directory)
        model.config._name_or_path = model.name_or_path = str(save_directory)
    return model


@contextmanager
def _verified(chain: Chain, target: Target) -> Iterator[None]:
    """Compare the files that a target is made from with chain.json while it is made."""
    for name, files in target.files.items():
        chain[name].need(*files)
    with ThreadPoolExecutor(1) as pool:
        verification = pool.submit(chain.verify, target.files)
        try:
            yield
        finally:
            # Whatever went wrong above, a damaged file is the reason.
            verification.result()


def calibration_tokens(target: Target, dataset: Dataset) -> TokenBlocks | None:
    """What decides about a target: the first tokens of a dataset. None for an anchor: there is nothing
    to decide."""
    if target.operator == ANCHOR:
        return None
    upper, dataset = target.anchors[0], sft_dataset(dataset, "calibration_dataset")
    return token_blocks(dataset, upper.load_tokenizer(), CALIBRATION_TOKENS, calibration_length(upper.config()))


def make_model(
    chain: Chain,
    request: Request,
    target: Target,
    tokens: TokenBlocks | None,
    dtype: torch.dtype | str | None,
    pair: Pair | None = None,
) -> PreTrainedModel:
    """The model of a target, in eval mode; it has a name only where it is an anchor.

    Args:
        tokens: calibration text, or None.
        pair: the target's anchors where they are loaded already.
    """
    upper = target.anchors[0]
    wanted = target_dtype(dtype, upper)
    told: dict[str, Any] = {
        # It goes wherever the model goes: no path of this machine.
        "chain": chain_label(chain),
        "revision": chain.revision,
        "anchors": [anchor.name for anchor in target.anchors],
        "operator": target.operator,
        "alpha": target.alpha,
        "shape": target.architecture.shape,
        "num_parameters": target.architecture.num_parameters,
    }
    if target.operator == ANCHOR:
        model = upper.load_model(dtype=wanted)
    else:
        pair = pair or load_pair(*target.anchors)
        operator, plan = request.operator, Plan(target.architecture, request.alpha)
        if tokens is not None:
            operator, plan = choose_plan(pair, plan, operator, tokens)
            alpha = default_alpha(operator, pair, plan.target)
            told |= {"operator": operator, "alpha": alpha if plan.alpha is None or alpha is None else plan.alpha}
            told["calibration_tokens"] = tokens.input_ids.numel()
        weights, architecture = OPERATORS[operator](pair, plan)
        if operator == "linear" or not pair.equal_widths:
            weights = _finite(weights, operator)
        model = build_model(architecture, weights, wanted)
        model.generation_config = upper.load_generation_config()
        if plan.swapped is not None:
            told["swapped_blocks"] = sorted(plan.swapped)
    if limit := describe(model.config).engine_limit():
        told["engine_limit"] = limit
    model.config.cbd_trl = told
    return model


def _name_unsaved(model: PreTrainedModel, chain: Chain) -> None:
    """Name a model that is saved nowhere, so that its tokenizer is found and other weights are not.

    Trainers look up its tokenizer, and some a reference model, by the name in its config: a folder that has all that a
    saved target has but the weights, as long as the process lives. peft takes the model's own name for the base of an
    adapter, and other people read it: a sentence, which no library finds a model by.
    """
    told = model.config.cbd_trl
    size = anchor_name(told["num_parameters"])
    folder = Path(tempfile.mkdtemp(dir=_unsaved_folder().name)) / f"{size}-from-{Path(told['chain']).name}-not-saved"
    folder.mkdir()
    upper = chain[told["anchors"][0]]
    upper.need(*upper.small_files)
    for name in upper.small_files:
        if "config" not in name or name.startswith("tokenizer"):
            _link((upper.path / name).resolve(), folder / name)
    model.config.save_pretrained(folder)
    save_card(folder, target_card(chain, told, folder.name))
    model.config._name_or_path = str(folder)
    model.name_or_path = (
        f"{size} from {told['chain']}, made in memory and saved nowhere: give cbd_trl.from_chain a save_directory"
    )


@functools.cache
def _unsaved_folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="cbd_trl-")


def _link(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(file)
    except OSError:
        # A system that does not let everyone make links.
        shutil.copyfile(file, place)


def load_pair(upper: Anchor, lower: Anchor) -> Pair:
    """Two neighbouring anchors, and the upper one's statistics where a width differs; nothing is read yet."""
    upper_architecture, lower_architecture = upper.architecture(), lower.architecture()
    assert lower.block_map is not None and lower.kept_layers is not None
    differs = upper_architecture.sizes != lower_architecture.sizes
    return Pair(
        upper.load_weights(),
        upper_architecture,
        lower.load_weights(),
        lower_architecture,
        upper.load_statistics() if differs else None,
        lower.block_map,
        lower.kept_layers,
        lower.block_costs,
    )


def _finite(weights: Weights, operator: str) -> Weights:
    """The same weights, each checked when it is made."""

    def tensor(key: str) -> torch.Tensor:
        made = weights[key]
        if not all(bound.isfinite() for bound in made.aminmax()):
            raise ValueError(
                f"operator={operator!r} made a tensor that is not finite ({key}). Check the anchors' weights for NaN "
                "or infinity."
            )
        return made

    return LazyWeights(weights, tensor)


def check_replaceable(directory: Path) -> None:
    """Refuse anything but an empty folder or a model that from_chain saved: what is there is replaced as a whole."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    config = directory / "config.json"
    if (
        not config.is_file()
        or "cbd_trl" not in json.loads(config.read_text(encoding="utf-8"))
        or any(entry.is_dir() for entry in directory.iterdir())
    ):
        raise ValueError(
            f"save_directory={str(directory)!r} holds something other than a model that from_chain saved. Choose an "
            "empty or new folder."
        )


def save_model(model: PreTrainedModel, chain: Chain, directory: Path) -> None:
    """Write model, the upper anchor's tokenizer, provenance and card under a temporary name, then rename."""
    told = model.config.cbd_trl
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary, before = (directory.parent / f".{kind}-{directory.name}-{os.getpid()}" for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        chain[told["anchors"][0]].load_tokenizer().save_pretrained(temporary)
        copy_picture(chain, temporary)
        save_card(temporary, target_card(chain, told, directory.name))
        if directory.exists():
            directory.rename(before)
        try:
            temporary.rename(directory)
        except OSError:
            if before.exists():
                before.rename(directory)
            raise
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
