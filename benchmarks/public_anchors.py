"""A model that exists already as the lower anchor of a chain: which way makes the sizes between the two work?

    python -m benchmarks.public_anchors --upper DIR --lower DIR --text rows.jsonl --output runs/public --steps 100

The two models were trained apart. Every way is trained on as many tokens of the same text:

- `untrained`: `chain_from_anchors`, which matches the two and trains nothing;
- `cut`: an anchor of the lower model's shape, cut from the upper one; the lower model is not used;
- `matched`: the lower model's weights in the coordinates of the upper one, distilled from it beside hybrids;
- `taught`: the cut, taught by both models;
- `both`: `matched`, taught by both;
- `refitted`: `both`, its layers fitted to the upper model's stream in closed form before training.

Reported are the losses of the upper model, of the lower one as it is published and of the anchor made of it, those of
sizes between, and eta (see `benchmarks.merit`), on held-out rows: the last of each text. Interrupted, it goes on where
it stopped.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from benchmarks.held_out import MEAN, HeldOut, eta_on, loss_on
from cbd_trl import Chain, DistillConfig, build_chain, chain_from_anchors, from_chain
from cbd_trl.architectures import describe
from cbd_trl.build import build, plan
from cbd_trl.build.public_anchor import adopt, plan_public_model
from cbd_trl.build.student import refit_student
from cbd_trl.chain.source import Source
from cbd_trl.report.measure import held_out_blocks
from cbd_trl.targets.request import Request, find_target
from cbd_trl.utils.files import Results

WAYS = ("untrained", "cut", "matched", "taught", "both", "refitted")
SHARES = (0.25, 0.5, 0.75)


def read_rows(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Training rows and held-out ones, the last tenth of each file."""
    train, held_out = [], []
    for file in files:
        rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        cut = len(rows) * 9 // 10
        train, held_out = train + rows[:cut], held_out + rows[cut:]
    return train, held_out


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Within it a public model is used in this way, whatever is the default."""

    def planned(*args: Any) -> Any:
        found = plan_public_model(*args)
        obstacle = "the benchmark compares the ways" if way == "taught" else None
        return dataclasses.replace(found, obstacle=found.obstacle or obstacle)

    def steps(*args: Any) -> Any:
        found = plan.plan_chain(*args)
        for step in found:
            if way == "matched":
                step.args.teacher_weights = None
        return found

    def adopted(file: Path, upper: Any, teacher: Any, public: Any, tokens: Any) -> tuple[Any, Any]:
        model, placement = adopt(file, upper, teacher, public, tokens)
        if way == "refitted":
            refit_student(model, teacher, list(placement.blocks), tokens)
        return model, placement

    with (
        patch.object(plan, "plan_public_model", planned),
        patch.object(build, "plan_chain", steps),
        patch.object(build, "adopt", adopted),
    ):
        yield


def arguments(options: argparse.Namespace) -> DistillConfig:
    return DistillConfig(
        output_dir="unused",
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        hidden_weight=options.hidden_weight,
        swap_probability=options.swap_probability,
        ce_weight=options.ce_weight,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=options.warmup,
        adam_beta2=0.95,
        weight_decay=0.0,
        per_device_train_batch_size=options.rows,
        max_length=options.length,
        packing=True,
        packing_strategy="wrapped",
        gradient_checkpointing=False,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_steps=50,
        save_total_limit=1,
        report_to="none",
        seed=options.seed,
    )


def make_chain(way: str, options: argparse.Namespace, dataset: Dataset, folder: Path) -> Chain:
    """The chain of the two models, made in one way."""
    upper, lower = str(options.upper), str(options.lower)
    if way == "untrained":
        return chain_from_anchors([upper, lower], dataset=dataset, output_dir=folder)
    shape = describe(Source(lower).config()).shape
    with forced(way):
        return build_chain(
            upper, [shape if way == "cut" else lower], dataset=dataset, output_dir=folder, args=arguments(options)
        )


def measure(chain: Chain, held_out: HeldOut) -> dict[str, Any]:
    """The anchors' losses, those of the sizes between, and eta."""
    large, small = (held_out.anchor(anchor) for anchor in chain.anchors)
    low, high = small["num_parameters"], large["num_parameters"]
    targets = []
    for share in SHARES:
        fields = find_target(chain, Request(low + share * (high - low), tolerance=0.15)).architecture.shape
        targets.append(held_out.target(chain, fields, "nested", partial(from_chain, chain, config=fields)))
    return {
        "ends": [loss_on(end, MEAN) for end in (large, small)],
        "sizes": [high, low],
        "targets": {target["num_parameters"]: loss_on(target, MEAN) for target in targets},
        "eta": eta_on(MEAN, small, large, targets),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upper", required=True)
    parser.add_argument("--lower", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="JSON lines with a field 'text'")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--hidden-weight", type=float)
    parser.add_argument("--swap-probability", type=float)
    parser.add_argument("--ce-weight", type=float, default=0.5)
    parser.add_argument("--held-out-blocks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--label", default="", help="of a variant of the arguments")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.upper)
    train, held_out_rows = read_rows(options.text)
    random.Random(options.seed).shuffle(train)
    random.Random(0).shuffle(held_out_rows)
    texts = {"held-out": held_out_blocks(tokenizer, held_out_rows, options.length, options.held_out_blocks)}
    results = Results(options.output / "results.json")
    held_out = HeldOut(texts, results, options.bf16)
    published = loss_on(held_out.once("published", [options.lower], Source(options.lower).model), MEAN)
    for way in options.ways:
        name = f"{way}{options.label}-{options.seed}"
        if results.get(name) is None:
            chain = make_chain(way, options, Dataset.from_dict({"text": train}), options.output / name)
            results.put(name, {"published": published, **measure(chain, held_out)})
        found = results.get(name)
        print(name, json.dumps({key: value for key, value in found.items() if key != "sizes"}), flush=True)


if __name__ == "__main__":
    main()
