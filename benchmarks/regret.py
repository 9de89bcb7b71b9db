"""Would a size between two anchors be better had it been distilled by itself?

    python -m benchmarks.regret --chain runs/real/chain runs/real-1/chain --gsm8k gsm8k_train.jsonl \\
        --wikitext wikitext2_valid.txt --output runs/regret

regret = held-out loss of what `from_chain` makes - that of a model of the same shape made on its own: cut from the
upper anchor and refitted to it as `build_chain` starts an anchor, then distilled from it without hybrids on the text,
in the order and for as many steps as the lower anchor was. Its learning rate is the best of three (`RATES`, of the
lower anchor's), chosen once a kind of pair: on its middle size, on the first chain that has such a pair, on held-out
rows that nothing else is measured on. With `--recovery-tokens` both models are trained further by cross-entropy alone
and compared again.

The chains are those of `benchmarks.real_text_chain`, best of several seeds; each anchor with the one above it is a
pair in depth, in width or in both (see `benchmarks.merit`). Of each pair the middle target of the plan is measured
and, on the first chain that has such a pair, another one.

On a text on which the upper anchor is not the better one (in parentheses) the number counts in the mean over the texts
alone. What was trained is kept: a run that was interrupted goes on at its last checkpoint, and a later chain finds the
models that were made on their own, if it has the same upper anchor. Where it has not, `--own-from` names the chains
whose anchors they are made from, so that every trial is compared with the same ones.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_utils import SaveStrategy, SchedulerType

from benchmarks.curves import Point, mean_loss, measured_curve
from benchmarks.flops import CALIBRATION_TOKENS
from benchmarks.held_out import MEAN, HeldOut, Measurement, divided, eta_on, loss_on, share_of_way
from benchmarks.merit import pairs_of
from benchmarks.real_text_chain import (
    BLOCK_LENGTH,
    PLANS,
    RESULTS,
    Fields,
    RealChain,
    arguments,
    held_out_texts,
    prose_rows,
    real_texts,
    training_dataset,
)
from benchmarks.starts import own_trainer, sft_trainer
from benchmarks.tables import machine, markdown
from cbd_trl import Chain, DistillConfig, from_chain
from cbd_trl.build.arguments import changed_arguments, training_record
from cbd_trl.build.training import ARGUMENTS
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.cards import VALUES
from cbd_trl.report.sweep import fingerprint
from cbd_trl.targets.request import Request, find_target
from cbd_trl.utils.blocks import calibration_length, token_blocks
from cbd_trl.utils.files import Results, write_text
from cbd_trl.utils.formatting import format_count

RATES = (0.5, 1.0, 2.0)
_RECOVERY_RATE = 2e-4


@dataclass(frozen=True)
class OwnRun:
    """A model made on its own.

    Args:
        upper: the anchor that it is cut from, and that teaches it.
        fields: config fields of its shape, all of them.
        args: training arguments.
        dataset: training text.
    """

    upper: Anchor
    fields: Fields
    args: DistillConfig
    dataset: Dataset

    @property
    def parts(self) -> list[Any]:
        """All that the model depends on, as `fingerprint` takes it."""
        record = training_record(self.args)[VALUES]
        return ["own", self.upper.files, self.fields, record, self.dataset["text"][:]]


def own_arguments(lower: Anchor, rate: float) -> DistillConfig:
    """The arguments that a lower anchor was trained with, but its learning rate times `rate` and no hybrids.

    Args:
        lower: of `benchmarks.real_text_chain`.
        rate: what its learning rate is multiplied by.

    Raises:
        ValueError: it was trained with further arguments.
    """
    own = lower.arguments
    args = arguments(
        own["max_steps"], own["learning_rate"] * rate, 0.0, own["seed"], own["bf16"],
        own["per_device_train_batch_size"], own["optim"],
    )  # fmt: skip
    args.hidden_weight, args.hidden_loss = own["hidden_weight"], own["hidden_loss"]
    unlike = set(changed_arguments(lower.training[ARGUMENTS], training_record(args)))
    if unlike := unlike - {"swap_probability", "learning_rate"}:
        raise ValueError(
            f"The anchor {lower.name} was trained with other {', '.join(sorted(unlike))} than "
            "benchmarks.real_text_chain trains with: a model made on its own would not be comparable. Build the chain "
            "with that benchmark."
        )
    return args


def _own_run(pair: Chain, shape: Fields, dataset: Dataset, rate: float) -> OwnRun:
    upper, lower = pair.anchors
    return OwnRun(upper, shape, own_arguments(lower, rate), dataset)


class Regret:
    """Targets and models made on their own, each trained and measured once.

    Args:
        held_out: measures; its results keep the curves and choices too.
        choosing: measures on the rows that learning rates are chosen on.
        folder: of the trained models.
        points: how many steps lie between two points of a curve.
        recovery: tokens of training afterwards; 0 for none.
    """

    def __init__(self, held_out: HeldOut, choosing: HeldOut, folder: Path, points: int, recovery: int) -> None:
        self.held_out, self.choosing, self.folder = held_out, choosing, folder
        self.points, self.recovery = points, recovery
        self.rates: dict[str, float] = {}

    def pair(
        self, kind: str, chain: Chain, own: Chain, sizes: Sequence[Fields], dataset: Dataset, of_anchor: bool
    ) -> list[dict[str, Any]]:
        """Measure some sizes of a pair, the middle one first.

        Args:
            kind: what the anchors differ in.
            chain: the pair.
            own: the pair that the models made on their own begin from: its upper anchor, as its lower one was trained.
            sizes: config fields of the targets.
            dataset: the text that the lower anchor was trained on.
            of_anchor: whether the lower anchor's shape is made on its own as well.
        """
        shapes = [find_target(chain, Request(config=fields)).architecture.shape for fields in sizes]
        if kind not in self.rates:
            self.rates[kind] = self._best_rate(f"{kind} {sizes[0]}", partial(_own_run, own, shapes[0], dataset))
        runs = [_own_run(own, shape, dataset, self.rates[kind]) for shape in shapes]
        if of_anchor:
            runs.append(_own_run(own, chain.anchors[-1].shape, dataset, 1.0))
        return [self._row(kind, chain, run) for run in runs]

    def _row(self, kind: str, chain: Chain, run: OwnRun) -> dict[str, Any]:
        large, small = (self.held_out.anchor(anchor) for anchor in chain.anchors)
        label, make = f"{kind} {run.fields}", partial(from_chain, chain, config=run.fields)
        is_anchor = run.fields == chain.anchors[-1].shape
        target = small if is_anchor else self.held_out.target(chain, run.fields, "nested", make)
        own = self._own(f"{label} own", run, self.held_out)
        row = {"kind": kind, "seed": run.args.seed, "rate": run.args.learning_rate, "anchor": is_anchor}
        row |= {"large": large, "small": small, "target": target, "own": own, "curve": self._curve(run)}
        if self.recovery:
            parts = ["from_chain", [anchor.files for anchor in chain.anchors], run.fields]
            row["target recovered"] = self._recovered(f"{label} recovered", make, parts, run)
            own_model = partial(self._model, label, run)
            row["own recovered"] = self._recovered(f"{label} own recovered", own_model, run.parts, run)
        return row

    def _best_rate(self, label: str, run_at: Any) -> float:
        runs, losses = {rate: run_at(rate) for rate in RATES}, dict[float, float]()
        for rate, run in runs.items():
            losses[rate] = mean_loss(self._own(f"{label}, rate {run.args.learning_rate:g}", run, self.choosing))
        best = min(losses, key=losses.__getitem__)
        for rate, run in runs.items():
            if rate != best:
                shutil.rmtree(self._place(run), ignore_errors=True)
        return best

    def _own(self, label: str, run: OwnRun, held_out: HeldOut) -> Measurement:
        return held_out.once(label, run.parts, partial(self._model, label, run))

    def _place(self, run: OwnRun) -> Path:
        return self.folder / fingerprint(*run.parts)

    def _curve(self, run: OwnRun) -> list[Point]:
        curve: list[Point] = self.held_out.results.get(self._curve_key(run)) or []
        return curve

    def _curve_key(self, run: OwnRun) -> str:
        return fingerprint("curve", *run.parts, self.points, sorted(self.held_out.texts))

    def _model(self, label: str, run: OwnRun) -> PreTrainedModel:
        """The trained model of a run; it is trained now if it was not."""
        place = self._place(run)
        made = place / "model"
        if not made.exists():
            print(f"{label}: training", flush=True)
            args = dataclasses.replace(run.args, output_dir=str(place / "trainer"))
            tokenizer = run.upper.load_tokenizer()
            length = calibration_length(run.upper.config())
            calibration = token_blocks(run.dataset, tokenizer, CALIBRATION_TOKENS, length, args).input_ids
            trainer: Any = own_trainer(run.upper, run.fields, args, run.dataset, tokenizer, calibration)
            steps = sorted({*range(0, args.max_steps, self.points), args.max_steps})
            keep = partial(self.held_out.results.put, self._curve_key(run))
            measured_curve(trainer, steps, self.held_out, self._curve(run), keep)
            trainer.model.save_pretrained(place / "trainer" / "model")
            (place / "trainer" / "model").rename(made)
            shutil.rmtree(place / "trainer")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(made)
        return model

    def _recovered(self, label: str, make: Any, parts: Sequence[Any], run: OwnRun) -> Measurement:
        """Measure a model after training by cross-entropy at a constant rate, on the text in another order."""
        args = dataclasses.replace(run.args, output_dir=str(self.folder / "recovery"), learning_rate=_RECOVERY_RATE)
        step_tokens = args.per_device_train_batch_size * BLOCK_LENGTH
        args.max_steps, args.seed = -(-self.recovery // step_tokens), args.seed + 1
        args.lr_scheduler_type, args.lr_scheduler_kwargs = SchedulerType.CONSTANT_WITH_WARMUP, {}
        args.save_strategy = SaveStrategy.NO

        def trained() -> PreTrainedModel:
            trainer: Any = sft_trainer(make(), args, run.dataset, run.upper.load_tokenizer())
            trainer.train()
            model: PreTrainedModel = trainer.model
            return model

        settings = training_record(args)[VALUES]
        return self.held_out.once(label, ["recovered", *parts, settings, run.dataset["text"][:]], trained)


def chosen_sizes(chain: Chain, targets: Sequence[Fields], count: int) -> list[Fields]:
    """The targets that lie nearest to the middle of a pair, in parameters.

    Args:
        chain: the pair.
        targets: of the plan.
        count: how many.
    """
    large, small = (anchor.num_parameters for anchor in chain.anchors)

    def distance(fields: Fields) -> float:
        size = find_target(chain, Request(config=fields)).architecture.num_parameters
        return abs((size - small) / (large - small) - 0.5)

    return sorted(targets, key=distance)[:count]


def regret_on(row: Mapping[str, Any], text: str, after: str = "") -> float:
    """Regret of a row of `Regret.pair` on a text or for `MEAN`, in nats; of the recovered models with " recovered"."""
    return loss_on(row[f"target{after}"], text) - loss_on(row[f"own{after}"], text)


def mean_regret(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean regret of each kind of pair over the rows that are no anchors, on the mean of the texts."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if not row["anchor"]:
            found.setdefault(row["kind"], []).append(regret_on(row, MEAN))
    return {kind: sum(regrets) / len(regrets) for kind, regrets in found.items()}


def table(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> str:
    """Losses, regret and eta of each row as Markdown, then the mean regret of each kind of pair."""
    header = ["pair", "seed", "parameters", "of the way", "rate", f"loss: {' / '.join(texts)}", "own"]
    header += [*(f"regret, {text}" for text in texts), "regret", "after recovery", "eta"]
    lines = []
    for row in rows:
        size, share = row["target"]["num_parameters"], share_of_way(row["small"], row["large"], row["target"])
        losses = [" / ".join(f"{loss_on(row[what], text):.3f}" for text in texts) for what in ("target", "own")]
        regrets = [
            f"{regret_on(row, text):+.3f}"
            if loss_on(row["large"], text) < loss_on(row["small"], text)
            else f"({regret_on(row, text):+.3f})"
            for text in texts
        ]
        recovered = f"{regret_on(row, MEAN, ' recovered'):+.3f}" if "own recovered" in row else ""
        merit = None if row["anchor"] else eta_on(MEAN, row["small"], row["large"], [row["target"]])
        place = [row["kind"], str(row["seed"]), format_count(size), f"{share:.2f}", f"{row['rate']:g}"]
        means = [f"{regret_on(row, MEAN):+.3f}", recovered, "" if merit is None else f"{merit:.2f}"]
        lines.append([*place, *losses, *regrets, *means])
    summary = "; ".join(f"mean regret in {kind}: {regret:+.3f}" for kind, regret in mean_regret(rows).items())
    return f"{markdown(header, lines)}\n{summary}\n"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the curve of every own run, mean over the texts, with a line at the loss of what `from_chain` makes.

    Args:
        rows: of `Regret.pair`.
        path: of the PNG.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure = Figure(figsize=(5.0 * len(kinds), 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for number, row in enumerate(row for row in rows if row["kind"] == kind):
            label = f"{format_count(row['target']['num_parameters'])}, seed {row['seed']}"
            xs = [point["tokens"] / 1000 for point in row["curve"]]
            axes.plot(xs, [mean_loss(point) for point in row["curve"]], color=f"C{number}", marker="o", label=label)
            axes.axhline(mean_loss(row["target"]), color=f"C{number}", linestyle="--")
        axes.set(title=kind, xlabel="tokens of the run on its own (thousands)")
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("held-out loss (nats per token); dashed: from_chain")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def measure_chains(
    regret: Regret,
    chains: Sequence[Chain],
    plan: RealChain,
    data: Any,
    kinds: Sequence[str],
    of_anchor: bool,
    own_from: Sequence[Chain] = (),
) -> list[dict[str, Any]]:
    """The rows of all pairs.

    Args:
        regret: measures.
        chains: in order; the first one that has a kind of pair counts for its learning rate and its second size.
        plan: names the targets.
        data: seed -> training text.
        kinds: of pairs to measure.
        of_anchor: whether the lower anchors' shapes are made on their own as well.
        own_from: chains whose pairs, of the same kind and seed, the models made on their own begin from; where there
            is none, the chain itself.
    """
    rows: list[dict[str, Any]] = []
    own = {(kind, _seed(pair)): pair for chain in own_from for kind, pair in pairs_of(chain).items()}
    for chain in chains:
        for kind, pair in pairs_of(chain).items():
            if kind not in kinds:
                continue
            sizes = chosen_sizes(pair, plan.targets[kind], 1 if kind in regret.rates else 2)
            begins = own.get((kind, _seed(pair)), pair)
            rows += regret.pair(kind, pair, begins, sizes, data(_seed(pair)), of_anchor)
    return rows


def _seed(pair: Chain) -> int:
    seed: int = pair.anchors[-1].arguments["seed"]
    return seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, nargs="+", required=True, help="of benchmarks.real_text_chain")
    parser.add_argument("--own-from", type=Path, nargs="+", default=[], help="chains to make models on their own from")
    parser.add_argument("--plan", choices=PLANS, default="smollm2-135m", help="of `benchmarks.real_text_chain`")
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="a further held-out text: JSON lines with a field 'text', or .xz")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", choices=("depth", "width", "both"), default=("depth", "width", "both"))
    parser.add_argument("--held-out-blocks", type=int, default=40, help=f"of {BLOCK_LENGTH} tokens, of each text")
    parser.add_argument("--skip-blocks", type=int, default=20, help="the first ones, to choose learning rates on")
    parser.add_argument("--points", type=int, default=50, help="steps between two points of a curve")
    parser.add_argument("--recovery-tokens", type=int, default=0, help="of further training of both models")
    parser.add_argument("--anchors", action="store_true", help="the lower anchors' shapes on their own, too")
    parser.add_argument("--fp32", action="store_true", help="float32 instead of bf16 mixed precision")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chains, own_from = ([Chain.from_pretrained(one) for one in some] for some in (options.chain, options.own_from))
    rows_of = real_texts(options)
    if options.text is not None:
        rows_of[options.text.name.partition(".")[0]] = prose_rows(options.text)
    blocks = held_out_texts(rows_of, chains[0].tokenizer(), options.skip_blocks + options.held_out_blocks)
    choosing, texts = divided(blocks, options.skip_blocks)
    results, bf16 = Results(options.output / RESULTS), not options.fp32
    held_out, choosing_on = HeldOut(texts, results, bf16), HeldOut(choosing, results, bf16)
    regret = Regret(held_out, choosing_on, options.output / "own", options.points, options.recovery_tokens)
    data = partial(training_dataset, options)
    rows = measure_chains(regret, chains, PLANS[options.plan], data, options.pairs, options.anchors, own_from)
    write_text(options.output / "regret.json", json.dumps(rows, indent=1))
    report = f"{table(rows, list(texts))}\n{machine(options.threads)}"
    write_text(options.output / "regret.md", report)
    plot(rows, options.output / "regret.png")
    print(report)


if __name__ == "__main__":
    main()
