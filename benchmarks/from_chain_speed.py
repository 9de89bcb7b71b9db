"""How long from_chain takes and how much memory, against loading a stock model of the target's size.

    python benchmarks/from_chain_speed.py [--chain DIR] [--large] [--quick] [--repeats 5] [--work DIR] [--json FILE]

Everything in one run, on one machine, with a warm page cache, contestants alternating; medians.

1. Depth alone, again and again in one process: from_chain of a folder, against `from_pretrained` of the same model
   saved. (The first call has a row of its own below.)
2. The first call in a fresh process, both after the imports that a user of either needs: from_chain with all its
   checks, against `from_pretrained`. The sha256 of the anchors' files are known from an earlier process, as they are
   ever after; "files unknown" is the call that finds them out.
3. --large: random weights of the shape of Qwen2.5-1.5B in bfloat16, all 28 layers, cut to 1.2B, against the same
   triangular solves and matrix products of random float32 matrices, done plainly.
4. Resident memory at its highest during the call above that before it, against 1.25 times the target's bytes plus
   one upper layer's tensors and its statistics unpacked, both in float32. Mapped pages of files count as resident.
   Statistics on disk, against the anchor's weights in bfloat16.

Weights are random unless --chain gives a real chain of SmolLM2-135M's shape for 1 and 2 (a file's content does not
change how long it takes). `from_pretrained` maps its file and copies nothing; so does from_chain where nothing is
computed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from random_chain import qwen, smol, tiny, write_random_chain
from tables import machine, markdown
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from cbd_trl import Chain, from_chain
from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import axis_length, prefix_index
from cbd_trl.shapes.cut import cut_architecture

WIDTH = {"hidden_size": 477, "intermediate_size": 1280, "num_attention_heads": 9, "num_key_value_heads": 3}
LARGE = {"hidden_size": 1344, "intermediate_size": 7840}


@dataclass
class Case:
    """One target.

    Args:
        name: of its row.
        chain: folder.
        fields: config fields of the target.
        operator: of from_chain.
    """

    name: str
    chain: str
    fields: dict[str, int] = field(default_factory=dict)
    operator: str = "nested"

    @property
    def request(self) -> dict[str, Any]:
        """For first_call.py."""
        return {"chain": self.chain, "config": self.fields, "operator": self.operator}


def in_child(request: dict[str, Any], assets: Path | None = None) -> dict[str, Any]:
    """What first_call.py measures in a fresh process, with what is remembered of files in the folder `assets`."""
    request = {"threads": torch.get_num_threads(), **request}
    command = [sys.executable, str(Path(__file__).with_name("first_call.py")), json.dumps(request)]
    environment = {**os.environ, "HF_ASSETS_CACHE": str(assets)} if assets else None
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def alternate(contestants: list[Callable[[], float]], repeats: int) -> list[float]:
    """Medians of what each gives, taking turns."""
    taken: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats):
        for seconds, contestant in zip(taken, contestants, strict=True):
            seconds.append(contestant())
    return [statistics.median(seconds) for seconds in taken]


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def again_and_again(case: Case, work: Path, repeats: int) -> dict[str, Any]:
    """Part 1."""
    saved = work / "depth"
    from_chain(case.chain, config=case.fields).save_pretrained(saved)
    contestants = [
        lambda: timed(lambda: from_chain(case.chain, config=case.fields)),
        lambda: timed(lambda: AutoModelForCausalLM.from_pretrained(saved)),
    ]
    alternate(contestants, 1)
    ours, stock = alternate(contestants, 3 * repeats)
    return {"name": f"{case.name}, repeated", "seconds": ours, "stock": stock, "ratio": ours / stock, "limit": 1.5}


def allowance(case: Case, target_bytes: int) -> float:
    """Bytes that point 4 allows."""
    config = Chain.from_pretrained(case.chain, verify=False).pair_for(config=case.fields)[0].architecture()
    layer = sum(
        math.prod(axis_length(axis, config.sizes) for axis in axes)
        for key, axes in config.tensors.items()
        if config.split_name(key)[0] == 0
    )
    moments = sum(axis_length(site.axis, config.sizes) ** 2 for site in config.family.sites)
    return 1.25 * target_bytes + 4 * (layer + moments)


def first_call(case: Case, work: Path, repeats: int, known: bool = True) -> dict[str, Any]:
    """Part 2, and the memory of part 4; `known`: whether an earlier process has hashed the files."""
    saved = work / "first" / f"{case.name}-{case.operator}".replace(" ", "-")
    whole = in_child({**case.request, "save": str(saved)}, work / "assets")
    runs: list[dict[str, Any]] = []

    def ours() -> float:
        assets = work / "assets" if known else Path(tempfile.mkdtemp(dir=work))
        runs.append(in_child(case.request, assets))
        return float(runs[-1]["seconds"])

    seconds, stock = alternate([ours, lambda: float(in_child({"stock": str(saved)})["seconds"])], repeats)
    above = statistics.median(run["above"] for run in runs)
    return {
        "name": f"{case.name}, {case.operator}, first call{'' if known else ', files unknown'}",
        "parameters": whole["parameters"],
        "seconds": seconds,
        "stock": stock,
        "ratio": seconds / stock,
        "limit": 4.0,
        "above": above,
        "bytes": whole["bytes"],
        "allowance": allowance(case, whole["bytes"]),
    }


def plain_solves(upper: Architecture, target: Architecture) -> float:
    """Seconds that the solves and products of a cut take on random float32 matrices, nothing else done."""
    seconds = 0.0
    for site in upper.sites:
        full, kept = axis_length(site.axis, upper.sizes), len(prefix_index(site.axis, upper.sizes, target.sizes))
        if kept == full:
            continue
        factor = torch.randn(full, kept).mul_(0.3 / math.sqrt(full))
        factor[:kept].diagonal().fill_(1.0)
        for reader in site.readers:
            tied = reader == upper.family.head and upper.tied
            axes = upper.tensors[f"{upper.family.embedding if tied else reader}.weight"]
            rows = math.prod(axis_length(axis, target.sizes) for axis in axes if axis != site.axis)
            matrix = torch.randn(rows, full)
            start = time.perf_counter()
            if reader == site.readers[0]:
                solution = torch.linalg.solve_triangular(factor[:kept], factor[kept:], upper=False, left=False)
            torch.addmm(matrix[:, :kept], matrix[:, kept:], solution)
            seconds += time.perf_counter() - start
            del matrix
    return seconds


def against_solves(case: Case) -> dict[str, Any]:
    """Part 3."""
    run = in_child(case.request)
    upper = Chain.from_pretrained(case.chain, verify=False).pair_for(config=case.fields)[0].architecture()
    bound = plain_solves(upper, cut_architecture(upper, case.fields))
    return {
        "name": f"{case.name}, {case.operator}, against its solves",
        "parameters": run["parameters"],
        "seconds": run["seconds"],
        "stock": bound,
        "ratio": run["seconds"] / bound,
        "limit": 1.5,
        "above": run["above"],
        "bytes": run["bytes"],
        "allowance": allowance(case, run["bytes"]),
    }


def statistics_share(folder: str) -> list[dict[str, Any]]:
    """Bytes of each anchor's statistics over those of its weights in bfloat16."""
    return [
        {"name": anchor.name, "share": anchor.statistics_file.stat().st_size / (2 * anchor.num_parameters)}
        for anchor in Chain.from_pretrained(folder, verify=False).anchors
    ]


def report(rows: list[dict[str, Any]], shares: list[dict[str, Any]]) -> str:
    def memory(row: dict[str, Any]) -> list[str]:
        if "above" not in row:
            return ["", "", ""]
        return [f"{row[key] / 2**20:,.0f}" for key in ("bytes", "above", "allowance")]

    speed = markdown(
        ["target", "from_chain, s", "against, s", "ratio", "limit", "target, MiB", "peak above, MiB", "allowed, MiB"],
        [
            [
                row["name"],
                f"{row['seconds']:.3f}",
                f"{row['stock']:.3f}",
                f"{row['ratio']:.2f}",
                f"{row['limit']:g}",
                *memory(row),
            ]
            for row in rows
        ],
    )
    disk = markdown(
        ["anchor", "statistics over bf16 weights"], [[one["name"], f"{one['share']:.3f}"] for one in shares]
    )
    return f"{speed}\n{disk}"


def chains(options: argparse.Namespace, work: Path) -> tuple[list[Case], Case | None]:
    """The cases of parts 1 and 2, depth first, and that of part 3; random chains are written where none is given."""

    def written(name: str, configs: list[Any], dtype: torch.dtype = torch.float32) -> str:
        if not (work / name / "chain.json").exists():
            write_random_chain(work / name, configs, dtype)
        return str(work / name)

    if options.quick:
        small = written("tiny", [tiny(), tiny(4), tiny(4, 24, 48)])
        return [Case("tiny depth", small, {"num_hidden_layers": 5}), Case("tiny width", small, {"hidden_size": 36})], (
            Case("tiny", small, {"hidden_size": 36}) if options.large else None
        )
    one = options.chain or written("135M", [smol(), smol(16), smol(16, 384, 1024, 6)])
    both = written("135M-both", [smol(), smol(16, 384, 1024, 6)])
    at_once = {**WIDTH, "num_hidden_layers": 22}
    cases = [Case("135M depth 22", one, {"num_hidden_layers": 22})]
    cases += [Case("135M width 477", one, WIDTH, operator) for operator in ("nested", "slice", "expand", "linear")]
    cases.append(Case("135M both", both, at_once))
    if not options.large:
        return cases, None
    return cases, Case("1.2B of 1.5B", written("1.5B", [qwen(), qwen(1152, 6720)], torch.bfloat16), LARGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", help="a real chain of 30x576, 16x576 and 16x384 (default: random weights)")
    parser.add_argument("--large", action="store_true", help="part 3: 14 GB of memory and 8 of disk")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the benchmark out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, help="where random chains are kept for another run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        cases, large = chains(options, work)
        repeats = 1 if options.quick else options.repeats
        rows = [again_and_again(cases[0], Path(temporary), repeats)]
        rows += [first_call(case, Path(temporary), repeats) for case in cases]
        rows += [first_call(cases[0], Path(temporary), repeats, known=False)]
        rows += [against_solves(large)] if large else []
        folders = dict.fromkeys(case.chain for case in [*cases, *([large] if large else [])])
        shares = [share for folder in folders for share in statistics_share(folder)]
    print(report(rows, shares) + "\n" + machine(options.threads))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "statistics": shares}, indent=1))


if __name__ == "__main__":
    main()
