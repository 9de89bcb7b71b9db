"""Speed and memory of `DistillTrainer` against its peers and against the bound.

    python -m benchmarks.distill_speed --teacher DIR --gsm8k gsm8k_train.jsonl --output runs/speed [--cache]

Who runs and what is scored: `benchmarks.peers`. What memory means: `benchmarks.meter`. Every contestant runs in a
process of its own, all of them in one order and then in the other, with nothing else on the machine. Interrupted, it
goes on where it was; `--only` picks contestants. Each ratio is taken within one order; the table holds the median of
the two and both.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import BOTH_WAYS, CACHED, CONTESTANTS, Run
from benchmarks.tables import gigabytes, machine, markdown
from benchmarks.teacher_cache import ensure_cache
from benchmarks.workload import ROWS_PER_STEP, add_inputs, environment, workload_from
from cbd_trl.utils.files import Results, write_text

ORDERS = ("forward", "backward")
# What is divided by what, of which number, and what is wanted.
RATIOS = (
    ("ours", "trl-gkd", "tokens_per_second", ">= 1.5"),
    ("ours", "trl-gkd", "above_bytes", "<= 0.5"),
    ("ours-all-terms", "boomerang-loop", "tokens_per_second", ">= 1.3"),
    ("ours", "bound", "tokens_per_second", ">= 0.90"),
    ("ours-cached", "sft", "tokens_per_second", ">= 0.95"),
)
_NAMES = {"tokens_per_second": "speed", "above_bytes": "memory"}

Measured = dict[str, dict[str, dict[str, Any]]]


def key(name: str, order: str, options: argparse.Namespace) -> str:
    """Where a measurement is kept: everything that makes it what it is."""
    settings = f"warm_up={options.warm_up} timed={options.steps}"
    if name in CACHED:
        settings += f" kind={options.kind}"
    if options.rows is not None:
        settings += f" rows={options.rows}"
    if options.rows_per_step != ROWS_PER_STEP:
        settings += f" rows_per_step={options.rows_per_step}"
    return f"{name} {order} {settings} threads={options.threads} seed={options.seed}"


def run_child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one contestant in a fresh process."""
    file = options.output.resolve() / "child.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.distill_speed", *sys.argv[1:], "--child", name]
    subprocess.run(command, check=True, env=environment(options.threads))
    return json.loads(file.read_text(encoding="utf-8"))


def processor_use() -> dict[str, float]:
    """Of this whole process: seconds in its own code and in the kernel, and pages of memory that it was given."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"user_seconds": used.ru_utime, "system_seconds": used.ru_stime, "page_faults": used.ru_minflt}


def measure(options: argparse.Namespace, names: Sequence[str]) -> Measured:
    """Every contestant in both orders: `{order: {name: result}}`; what was measured before is not repeated."""
    results = Results(options.output / "speed.json")
    measured: Measured = {order: {} for order in ORDERS}
    for order in ORDERS:
        for name in names if order == ORDERS[0] else reversed(names):
            place = key(name, order, options)
            if results.get(place) is None:
                results.put(place, run_child(name, options))
            found = measured[order][name] = results.get(place)
            print(
                f"{order:8} {name:15} {found['seconds_per_step']:7.2f} s/step {found['tokens_per_second']:7.1f} "
                f"tokens/s {gigabytes(found['above_bytes'])} GB above",
                flush=True,
            )
    return measured


def with_fastest(measured: Measured) -> Measured:
    """Add the faster of the two ways to run a contestant under the name of both."""
    for results in measured.values():
        for name in BOTH_WAYS:
            ways = [result for way, result in results.items() if way[:-2] == name]
            if ways:
                results[name] = max(ways, key=lambda result: result["tokens_per_second"])
    return measured


def both(measured: Measured, name: str, field: str) -> float:
    """Median over the orders."""
    return statistics.median(results[name][field] for results in measured.values())


def report(measured: Measured, names: Sequence[str]) -> str:
    """The numbers and the ratios as Markdown."""
    lines = [
        [
            name,
            f"{both(measured, name, 'seconds_per_step'):.2f}",
            f"{both(measured, name, 'tokens_per_step'):.0f}",
            f"{both(measured, name, 'tokens_per_second'):.1f}",
            gigabytes(both(measured, name, "above_bytes")),
            gigabytes(both(measured, name, "peak_bytes")),
        ]
        for name in names
    ]
    header = ["contestant", "s/step", "real tokens/step", "real tokens/s", "GB above", "GB in all"]
    return markdown(header, lines) + "\n" + _ratios(with_fastest(measured))


def _ratios(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = []
    for upper, lower, field, wanted in RATIOS:
        if all(upper in results and lower in results for results in measured.values()):
            found = [results[upper][field] / results[lower][field] for results in measured.values()]
            orders = ", ".join(f"{ratio:.2f}" for ratio in found)
            lines.append([f"{_NAMES[field]}: {upper} / {lower}", f"{statistics.median(found):.2f}", orders, wanted])
    return markdown(["ratio", "median", "both orders", "wanted"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser)
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps")
    parser.add_argument("--warm-up", type=int, default=2, help="optimizer steps before them")
    parser.add_argument("--rows", type=int, help="of GSM8K, gone over again; by default as many as the steps take")
    parser.add_argument("--rows-per-step", type=int, default=ROWS_PER_STEP, help="of the padded contestants")
    parser.add_argument("--only", type=lambda text: text.split(","), help="contestants, with commas between")
    parser.add_argument(
        "--cache", action="store_true", help="also ours-cached; the cache is written if it is not there"
    )
    parser.add_argument("--kind", default="top_k", choices=("top_k", "sampled", "hidden"), help="of the cache")
    parser.add_argument("--child", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    workload = workload_from(options)
    cache: Path = workload.output / f"speed-cache-{options.kind}"
    run = Run(workload, options.warm_up, options.steps, cache, rows=options.rows, rows_per_step=options.rows_per_step)
    if options.child:
        found = CONTESTANTS[options.child](run) | processor_use()
        write_text(workload.output / "child.json", json.dumps(found))
        return
    if unknown := sorted(set(options.only or []) - set(CONTESTANTS)):
        parser.error(f"--only names {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    names = [name for name in CONTESTANTS if name in (options.only or CONTESTANTS)]
    if not options.cache and set(CACHED) & set(names):
        print(f"{' and '.join(CACHED)} are left out: pass --cache to write a cache and train from it")
        names = [name for name in names if name not in CACHED]
    workload.prepare()
    if set(CACHED) & set(names):
        ensure_cache(workload, run.dataset(), cache, options.kind)
    text = report(measure(options, names), names)
    write_text(options.output / "speed.md", machine(options.threads) + "\n" + text)
    print(text)


if __name__ == "__main__":
    main()
