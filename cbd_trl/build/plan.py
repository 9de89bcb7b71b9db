"""Plan a build and check it before any long work: every anchor's shape, arguments and text."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import Architecture
from cbd_trl.build.arguments import check_chain_arguments
from cbd_trl.build.compatibility import check_smaller
from cbd_trl.build.public_anchor import PublicModel, plan_public_model
from cbd_trl.build.width_hybrid import targets_between
from cbd_trl.chain.source import Source
from cbd_trl.shapes.budget import Budget, ParameterCount
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.solve import nearest_architecture, solve_anchor
from cbd_trl.surgery.blocks import spaced_blocks
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.checks import check_hybrids_unsharded
from cbd_trl.trainers.distill_config import DistillConfig, check_config
from cbd_trl.utils.datasets import sft_dataset
from cbd_trl.utils.formatting import anchor_name

# Measured on SmolLM2-135M (docs/results). Between two depths the hidden-state term keeps an anchor's layers near
# the blocks that replace them, and hybrids beside half of the steps bring the models between from 0.84 to 1.23 of what
# a straight line would gain, at no loss to the anchor. A narrower stream cannot be the wider one's, and what holds it
# there costs anchor and targets alike: hybrids alone, beside every step, are better.
HIDDEN_WEIGHT = 2.0
# With the cosine, which does not see it, the size of the stream drifted, and the upper anchor's blocks build on it.
# The two were not compared by themselves.
HIDDEN_LOSS = "mse"
SWAP_PROBABILITY = 0.5
WIDTH_HIDDEN_WEIGHT = 0.0
WIDTH_SWAP_PROBABILITY = 1.0
# Of a model that teaches beside the anchor above. One that becomes the anchor keeps by it what it knows: anchor and
# sizes between are better by 0.006 to 0.018 nats (docs/results/trained_apart.md).
PUBLIC_WEIGHT = 0.5
_OWN_OPTIONS = ("args", "dataset")
_SIZE_OPTION = "size"
_MODEL_OPTIONS = ("model", "revision", *_OWN_OPTIONS)
# A number, with a unit or without, as people write sizes, which is no name of a model.
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([kKmMbB]?)\s*")
_UNITS = {"": "", "k": "e3", "m": "e6", "b": "e9"}


# What an anchor may be requested as: config fields, a size, or a model that exists already.
AnchorRequest = Mapping[str, Any] | float | str | Path | PreTrainedModel


@dataclass(frozen=True)
class Given:
    """What is needed to look at models that are requested as anchors.

    Args:
        tokenizer: the chain's.
        token: for models on the Hub that are private or gated.
        models: those that are in the chain already.
        commits: of models on the Hub, by id and requested revision, that an earlier run began with.
    """

    tokenizer: PreTrainedTokenizerBase
    token: str | None
    models: list[Source]
    commits: Mapping[tuple[str, str | None], str] = field(default_factory=dict)


@dataclass(frozen=True)
class ShapeSearch:
    """How the shapes of anchors that are requested by their size are found: by measuring several.

    Args:
        shapes: to compare for each such anchor, at most.
        trainings: how many of the best are trained for a few steps before the choice.
        training_steps: of each.
        chosen: config fields of the anchors that a shape was found for already, by their position among those
            requested. Of the others the first shape that will be compared is planned.
        budget: what shapes of one size have in common.

    Raises:
        ValueError: a number that is out of range.
    """

    shapes: int
    trainings: int = 0
    training_steps: int = 50
    chosen: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    budget: type[Budget] = ParameterCount

    def __post_init__(self) -> None:
        for name, value, least, usual in (
            ("shape_search", self.shapes, 2, 16),
            ("shape_trainings", self.trainings, 0, 3),
            ("shape_training_steps", self.training_steps, 1, 50),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}, such as {usual}.")
        if self.trainings == 1 or self.trainings > self.shapes:
            raise ValueError(
                f"shape_trainings={self.trainings} must be 0, or from 2 to the {self.shapes} of shape_search: the "
                "best of these shapes are trained, and compared again."
            )

    def with_chosen(self, position: int, fields: Mapping[str, int]) -> "ShapeSearch":
        """The same search, with the shape of another anchor."""
        return replace(self, chosen={**self.chosen, position: fields})

    def record(self, size: float) -> dict[str, Any]:
        """Describe what decides the shape of an anchor, for chain.json."""
        steps = self.training_steps if self.trainings else 0
        return {"size": size, "shapes": self.shapes, "trainings": self.trainings, "training_steps": steps}


@dataclass(frozen=True)
class Step:
    """One lower anchor to be distilled.

    Args:
        name: its name in the chain.
        architecture: its shape. Which layers of the anchor above it keeps is chosen when it is made, and with them the
            per-layer fields of its config.
        args: training arguments, chain defaults filled in.
        dataset: text to distill on.
        public: the model that becomes this anchor, or teaches it; None for one that is cut and has one teacher.
        search: the record of the search that finds its shape (`ShapeSearch.record`), once it did with the scores;
            None for a shape that is solved for, or requested.
    """

    name: str
    architecture: Architecture
    args: DistillConfig
    dataset: Any
    public: PublicModel | None = None
    search: Mapping[str, Any] | None = None

    @property
    def matched(self) -> PublicModel | None:
        """The model that becomes this anchor; None for one that is cut."""
        return self.public if self.public is not None and self.public.matched else None

    @property
    def second_teacher(self) -> Architecture | None:
        """Of the model that teaches this anchor beside the one above; None where there is one teacher."""
        return None if self.public is None or self.args.teacher_weights is None else self.public.architecture


def check_anchors(anchors: Any) -> None:
    """Check that there is a list of anchors.

    Raises:
        TypeError: it is a single anchor.
        ValueError: it is empty.
    """
    if isinstance(anchors, PreTrainedModel):
        raise TypeError(
            f"anchors is a {type(anchors).__name__}, but must be a list with an entry for each lower anchor: "
            "anchors=[model]."
        )
    if isinstance(anchors, int | float | str | Path | Mapping):
        raise TypeError(
            f"anchors is {anchors!r}, but must be a list with an entry for each lower anchor: anchors=[{anchors!r}]."
        )
    if not anchors:
        raise ValueError(
            "No anchors were requested. Give at least one, for example anchors=[{'num_hidden_layers': 16}] or "
            "anchors=[0.6]."
        )


def plan_chain(
    source: Architecture,
    anchors: Sequence[AnchorRequest],
    args: DistillConfig,
    dataset: Any,
    given: Given | None = None,
    search: ShapeSearch | None = None,
    above: Sequence[Step] = (),
) -> list[Step]:
    """Resolve every requested anchor, from the source down.

    Args:
        source: the largest anchor.
        anchors: as `build_chain` takes them.
        args: of the chain.
        dataset: of the chain.
        given: what is needed to look at models that are requested as anchors.
        search: how shapes of anchors are found that are requested by their size; None to solve for them.
        above: the first of the steps, where they are planned already.

    Raises:
        ValueError: an anchor that cannot be cut from the one above it, or arguments that name a teacher or
            contradict the chain's defaults.
    """
    steps = list(above)
    for position in range(len(steps), len(anchors)):
        upper = steps[-1].architecture if steps else source
        names = [anchor_name(source.num_parameters), *(step.name for step in steps)]
        steps.append(plan_step(upper, anchors[position], position, args, dataset, names, given, search))
    return steps


def plan_step(
    upper: Architecture,
    anchor: AnchorRequest,
    position: int,
    args: DistillConfig,
    dataset: Any,
    taken: Sequence[str],
    given: Given | None = None,
    search: ShapeSearch | None = None,
) -> Step:
    """Resolve one anchor.

    Args:
        upper: the anchor above it.
        anchor: as requested: a dict of config fields or with a size, a parameter count, a ratio, or a model.
        position: among those requested.
        args: of the chain.
        dataset: of the chain.
        taken: names of the anchors above it.
        given: what is needed to look at models that are requested as anchors.
        search: how the shape of one that is requested by its size is found; None to solve for it.

    Raises:
        ValueError: it cannot be cut from the one above it, or its arguments name a teacher or contradict the chain's
            defaults.
    """
    options = dict(anchor) if isinstance(anchor, Mapping) else {}
    above = taken[-1] if position else f"the source ({taken[0]})"
    own = {key: options.pop(key) for key in _OWN_OPTIONS if key in options}
    public, record = None, None
    if (requested := _requested_model(anchor, position, given)) is not None:
        assert given is not None
        begun = given.commits.get((requested.name, requested.revision))
        source = requested.pinned() if begun is None else replace(requested, revision=begun)
        _check_new(source, position, given)
        names = above, f"anchors[{position}] ({source.label})"
        public = plan_public_model(source, requested.revision, upper, given.tokenizer, names)
        target = public.architecture if public.matched else nearest_architecture(upper, public.architecture)
    elif (size := requested_size(anchor, position)) is not None:
        record = None if search is None else search.record(size)
        found = None if search is None else search.chosen.get(position)
        target = cut_architecture(upper, solve_anchor(upper, size) if found is None else found)
    else:
        target = cut_architecture(upper, options)
    check_smaller((above, f"anchors[{position}]"), upper, target)
    args = _with_chain_defaults(own.get("args", args), upper, target)
    if public is not None:
        args.teacher_weights = [1 - PUBLIC_WEIGHT, PUBLIC_WEIGHT]
    if "dataset" in own:
        dataset = sft_dataset(own["dataset"], f"anchors[{position}]['dataset']", args)
    return Step(anchor_name(target.num_parameters, taken), target, args, dataset, public, record)


def _requested_model(anchor: Any, position: int, given: Given | None) -> Source | None:
    """The model that is requested as an anchor; None where a shape or a size is.

    Raises:
        ValueError: a text is a size, or a dict has a model and the fields of a shape.
    """
    revision = None
    if isinstance(anchor, Mapping):
        if "model" not in anchor:
            if "revision" in anchor:
                raise ValueError(
                    f"anchors[{position}] has a revision, and no model that it could be of. Add 'model', the Hub id, "
                    "or leave it out."
                )
            return None
        if further := [key for key in anchor if key not in _MODEL_OPTIONS]:
            raise ValueError(
                f"anchors[{position}] has a model and {', '.join(further)}: the shape is the model's. Leave "
                f"{'it' if len(further) == 1 else 'them'} out (beside 'model' there may be "
                f"{', '.join(_MODEL_OPTIONS[1:])}), or leave out the model and have the anchor cut from the one above."
            )
        anchor, revision = anchor["model"], anchor.get("revision")
        if not isinstance(anchor, str | Path | PreTrainedModel):
            raise TypeError(
                f"The model of anchors[{position}] is {anchor!r}. Give a model, the path of a folder, or a Hub id."
            )
    if not isinstance(anchor, str | Path | PreTrainedModel):
        return None
    _check_no_size(anchor, position)
    assert given is not None
    return Source(anchor, revision, given.token, role=f"model of anchors[{position}]")


def _check_no_size(anchor: Any, position: int) -> None:
    """Check that a text is no size, as people write it."""
    size = _SIZE.fullmatch(anchor) if isinstance(anchor, str) and not Path(anchor).exists() else None
    if size is not None:
        raise ValueError(
            f"anchors[{position}] is the text {anchor!r}, which would be the name of a model. A size is a number: "
            f"{size[1]}{_UNITS[size[2].lower()]}."
        )


def _check_new(source: Source, position: int, given: Given) -> None:
    """Check that a model is not in the chain already.

    Raises:
        ValueError: it is.
    """
    known = source.identity()
    for other in given.models:
        if other.identity() == known:
            raise ValueError(
                f"anchors[{position}] ({source.label}) is the same model as the {other.role}. "
                "Between two anchors lie models of other sizes: give another model, or leave it out."
            )
    given.models.append(source)


def requested_size(anchor: AnchorRequest, position: int) -> float | None:
    """Find the size that an anchor is requested by; None where a shape or a model is.

    Args:
        anchor: as `build_chain` takes it.
        position: among those requested.

    Raises:
        ValueError: it is not a positive number, or there are fields of a shape beside it.
    """
    _check_no_size(anchor, position)
    if isinstance(anchor, str | Path | PreTrainedModel):
        return None
    if not isinstance(anchor, Mapping):
        return _size(anchor, position)
    if _SIZE_OPTION not in anchor:
        return None
    if further := [key for key in anchor if key not in (_SIZE_OPTION, *_OWN_OPTIONS)]:
        raise ValueError(
            f"anchors[{position}] has a size and {', '.join(further)}: the shape is found for the size. Leave out the "
            f"one or the other (beside {_SIZE_OPTION!r} there may be {', '.join(_OWN_OPTIONS)})."
        )
    return _size(anchor[_SIZE_OPTION], position)


def plan_search(
    anchors: Sequence[AnchorRequest],
    shapes: int | None,
    trainings: int,
    training_steps: int,
    chosen: Mapping[int, Mapping[str, int]],
) -> ShapeSearch | None:
    """Plan how shapes are found.

    Args:
        anchors: as `build_chain` takes them.
        shapes: to compare; None to solve for every shape.
        trainings, training_steps, chosen: as of `ShapeSearch`.

    Raises:
        ValueError: a number that is out of range, no anchor is requested by its size, or trainings without a search.
    """
    if shapes is None:
        if trainings:
            raise ValueError(
                f"shape_trainings={trainings} trains the best shapes of a search, and there is none. Give "
                "shape_search, such as 16, or leave it out."
            )
        return None
    search = ShapeSearch(shapes, trainings, training_steps, chosen)
    if all(requested_size(anchor, position) is None for position, anchor in enumerate(anchors)):
        raise ValueError(
            f"shape_search={search.shapes} compares shapes of anchors that are requested by their size, and all of "
            "these have a shape or are models. Give a number of parameters or a ratio, such as anchors=[138e6], or "
            "leave shape_search out."
        )
    return search


def _size(anchor: Any, position: int) -> float:
    is_number = isinstance(anchor, int | float) and not isinstance(anchor, bool)
    if not is_number or not math.isfinite(anchor) or anchor <= 0:
        raise ValueError(
            f"anchors[{position}] is {anchor!r}. Give a dict of config fields, a parameter count above 1, a ratio to "
            "the anchor above, or a model."
        )
    return float(anchor)


def _with_chain_defaults(args: Any, upper: Architecture, target: Architecture) -> DistillConfig:
    # A BridgeDistillConfig is a subclass with other defaults and another loss.
    if not isinstance(args, DistillConfig) or isinstance(args, BridgeDistillConfig):
        raise TypeError(
            f"The args of an anchor are a {type(args).__name__}, but must be a DistillConfig, which has all defaults. "
            "Give args=DistillConfig(...)."
        )
    check_chain_arguments(args, "a chain", "the teacher of each anchor is the anchor above it")
    args, equal_widths = copy.deepcopy(args), target.sizes == upper.sizes
    models_between = _models_between(upper, target)
    if args.hidden_weight is None:
        requested = args.hidden_loss or args.hidden_projector or args.hidden_weight_end
        args.hidden_weight = HIDDEN_WEIGHT if equal_widths or requested else WIDTH_HIDDEN_WEIGHT
    if args.hidden_loss is None and args.hidden_weight:
        args.hidden_loss = HIDDEN_LOSS
    if args.swap_probability is None:
        share = SWAP_PROBABILITY if equal_widths else WIDTH_SWAP_PROBABILITY
        # Hybrids run the teacher's layers on the student's states, which diverge behind a projector.
        args.swap_probability = share if models_between and not args.hidden_projector else 0.0
    if args.swap_probability and not models_between:
        raise ValueError(
            f"swap_probability={args.swap_probability} trains models between an anchor and the one above it, and no "
            "shape lies between the two. Leave it out, set it to 0 in the `args` of that anchor, or make the anchor "
            "smaller."
        )
    check_config(args)
    check_hybrids_unsharded(args)
    return args


def _models_between(upper: Architecture, lower: Architecture) -> bool:
    """Whether any shape for hybrids lies between the two."""
    blocks = [list(block.layers) for block in spaced_blocks(upper.depth, lower.depth, upper.fits)]
    return lower.sizes == upper.sizes or bool(targets_between(upper, lower, blocks))
