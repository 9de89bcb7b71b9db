"""Sweep a chain: build, time and measure every operator at every size between the anchors, on the same tokens."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_trl.architectures import describe
from cbd_trl.surgery.grow import check_experts
from cbd_trl.targets.from_chain import from_chain
from cbd_trl.targets.operators import OPERATORS
from cbd_trl.utils.files import Results
from cbd_trl.utils.formatting import format_count

# Operators that a report measures unless others are requested, the default of `from_chain` first.
REPORTED = tuple(name for name, operator in OPERATORS.items() if operator.reported)
RANDOM = "random"

Evaluate = Callable[[PreTrainedModel], float]
Build = Callable[..., PreTrainedModel]


@dataclass(frozen=True)
class SweepTarget:
    """A size to make, as `from_chain` takes it.

    Args:
        num_parameters: parameter count, the nearest reachable shape is taken.
        config: config fields that are fixed.
        operators: those of the sweep that can make it; None: all of them.

    Raises:
        ValueError: if neither a size nor fields are given.
    """

    num_parameters: float | None = None
    config: Mapping[str, int] = field(default_factory=dict)
    operators: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.num_parameters is None and not self.config:
            raise ValueError(
                "A target of the sweep has neither a size nor a shape. Give SweepTarget(num_parameters=60e6), "
                "SweepTarget(config={'num_hidden_layers': 20}), or both."
            )

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in self.config.items()]
        if self.num_parameters is not None:
            parts.insert(0, format_count(self.num_parameters))
        return ", ".join(parts)

    @property
    def request(self) -> dict[str, Any]:
        """The size and fields as JSON."""
        return {"num_parameters": self.num_parameters, "config": dict(self.config)}


@dataclass(frozen=True)
class Probe:
    """A measurement of every model besides its loss.

    Args:
        name: what it is called in the report.
        key: identifies all that its values depend on besides the model, such as a `fingerprint`.
        measure: model -> anything JSON can write.
    """

    name: str
    key: str
    measure: Callable[[PreTrainedModel], Any]


@dataclass(frozen=True)
class Measurement:
    """One model, built and measured.

    Args:
        num_parameters: parameters of the model, a tied table counted once.
        shape: its shape in config fields.
        loss: held-out loss, nats per token.
        seconds: to build it, the files read included.
        probes: what every probe found, by its name.
    """

    num_parameters: int
    shape: dict[str, int]
    loss: float
    seconds: float
    probes: dict[str, Any] = field(default_factory=dict)


def fingerprint(*parts: Any) -> str:
    """Hash what a measurement depends on.

    Args:
        parts: strings, bytes, tensors, or anything JSON can write.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.cpu().contiguous().numpy().tobytes()
        elif isinstance(part, str):
            part = part.encode()
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def random_model(like: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Make a freshly initialized model of the same shape.

    Args:
        like: the model whose class and config are taken.
        seed: of the initialization; the caller's random state is left as it was.

    Returns:
        a model in eval mode, in the dtype of `like`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(like.config, dtype=like.dtype).eval()


def sweep(
    chain: Any,
    targets: Sequence[SweepTarget],
    operators: Sequence[str] = REPORTED,
    evaluate: Evaluate | None = None,
    *,
    results: Results | Path | str | None = None,
    key: str = "",
    seed: int = 0,
    random: bool = True,
    probes: Sequence[Probe] = (),
    build: Build = from_chain,
    on_step: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Build and measure the anchors, every target with every operator, and a random model of every target's shape.

    The first operator decides a target's shape; the others build exactly that shape.

    Args:
        chain: a `Chain`.
        targets: the sizes.
        operators: names of `from_chain`'s operators.
        evaluate: model -> held-out loss in nats per token, the same tokens for every model.
        results: a `Results`, or the file to keep them in: what it already holds is not measured again.
        key: identifies what `evaluate` measures, such as a `fingerprint` of the held-out tokens; results with another
            key, or of another chain, are measured anew.
        seed: of the random models.
        random: whether to measure random models.
        probes: further measurements; each is kept on its own, so that one more costs only itself.
        build: `from_chain`, or a stand-in with its signature.
        on_step: called before each measurement with its label, its number from 0, and how many there are.

    Returns:
        {"anchors": [{"name", "num_parameters", "shape", "loss", "seconds", "probes": {probe: value}}], "targets":
        [{"num_parameters", "shape", "seconds" of the first operator, "loss": {operator: nats}, "seconds_by_operator":
        {operator: seconds}, "probes": {operator: {probe: value}}}]}, in this order.

    Raises:
        ValueError: without operators, or without `evaluate`.
    """
    if not operators or evaluate is None:
        raise ValueError(
            f"operators={list(operators)}, evaluate={evaluate}: a sweep needs at least one operator and a function "
            "that measures a model, such as lambda model: held_out_loss(model, blocks)."
        )
    run = _Sweep(chain, evaluate, results, key, seed, build, probes)
    names = [*operators, *([RANDOM] if random else [])]
    steps: list[tuple[Any, str | None]] = [(anchor, None) for anchor in chain.anchors]
    steps += [
        (target, name)
        for target in targets
        for name in names
        if name in (operators[0], RANDOM) or target.operators is None or name in target.operators
        if name != "expand" or _grows(chain)
    ]
    anchors: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, (what, operator) in enumerate(steps):
        if on_step is not None:
            on_step(what.name if operator is None else f"{what}, {operator}", number, len(steps))
        if operator is None:
            measured = run.anchor(what)
            anchors.append({"name": what.name, **asdict(measured)})
            continue
        measured = run.target(what, operator, first=operators[0])
        if operator == operators[0]:
            rows.append({**asdict(measured), "loss": {}, "seconds_by_operator": {}, "probes": {}})
        _enter(rows[-1], operator, measured)
    return {"anchors": anchors, "targets": rows}


def _grows(chain: Any) -> bool:
    """Whether every anchor can grow to the one above: not every router lets one have more experts."""
    architectures = [anchor.architecture() for anchor in chain.anchors]
    try:
        for upper, lower in itertools.pairwise(architectures):
            check_experts(lower, upper)
    except ValueError:
        return False
    return True


def _enter(row: dict[str, Any], operator: str, measured: Measurement) -> None:
    """Put what one operator made into the row of its target."""
    row["loss"][operator] = measured.loss
    row["probes"][operator] = measured.probes
    if operator != RANDOM:
        row["seconds_by_operator"][operator] = measured.seconds


class _Sweep:
    """The state that all measurements of one sweep share."""

    def __init__(
        self,
        chain: Any,
        evaluate: Evaluate,
        results: Results | Path | str | None,
        key: str,
        seed: int,
        build: Build,
        probes: Sequence[Probe],
    ) -> None:
        self.chain = chain
        self.evaluate = evaluate
        self.results = results if isinstance(results, Results) else Results(results)
        self.files = [[anchor.name, anchor.files] for anchor in chain.anchors]
        self.key = fingerprint(key, self.files)
        self.seed = seed
        self.build = build
        self.probes = probes

    def anchor(self, anchor: Any) -> Measurement:
        return self._measure_once(["anchor", anchor.name], anchor.load_model)

    def target(self, target: SweepTarget, operator: str, first: str) -> Measurement:
        """Measure one target with one operator, in the shape that the first operator gives it."""
        if operator == first:
            return self._measure_once(
                [target.request, operator],
                lambda: self.build(self.chain, target.num_parameters, config=dict(target.config), operator=operator),
            )
        shape = self.target(target, first, first).shape
        if operator != RANDOM:
            return self._measure_once(
                [shape, operator], lambda: self.build(self.chain, config=shape, operator=operator)
            )
        return self._measure_once(
            [shape, operator, self.seed],
            # Only its config counts, and growing the lower anchor is the quickest way to one.
            lambda: random_model(
                self.build(self.chain, config=shape, operator="expand" if _grows(self.chain) else "linear"),
                self.seed,
            ),
        )

    def _measure_once(self, what: list[Any], make: Callable[[], PreTrainedModel]) -> Measurement:
        key = fingerprint(self.key, what)
        probes = {probe.name: fingerprint("probe", probe.key, self.files, what) for probe in self.probes}
        if any(self.results.get(each) is None for each in (key, *probes.values())):
            started = time.perf_counter()
            model = make()
            seconds = time.perf_counter() - started
            if self.results.get(key) is None:
                self.results.put(key, self._measured(model, seconds))
            for probe in self.probes:
                if self.results.get(probes[probe.name]) is None:
                    self.results.put(probes[probe.name], probe.measure(model))
        found = {name: self.results.get(each) for name, each in probes.items()}
        return Measurement(**self.results.get(key), probes=found)

    def _measured(self, model: PreTrainedModel, seconds: float) -> dict[str, Any]:
        return {
            "num_parameters": model.num_parameters(),
            "shape": describe(model.config).shape,
            "loss": self.evaluate(model),
            "seconds": round(seconds, 3),
        }
