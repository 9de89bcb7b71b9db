"""What attention over packed rows costs: under the dense mask, and within the rows.

    python -m benchmarks.packed_attention --output runs/packed

One layer's attention of SmolLM2-135M's shape (9 heads of 64, 3 keys to them), forward and backward, in float32, on
packs of 4,096 tokens. `dense` is transformers' SDPA under its own mask, what a GPU does without FlashAttention;
`within rows` is what the trainers do, here one row at a time. FLOPs are those of the matrix products (a causal kernel
does half of a row's). Bytes are counted on the strict device of tests/device: of the mask, and the most that was alive
above queries, keys and values, with scores held as by SDPA without a fused kernel; a fused one holds the mask alone.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

from benchmarks.tables import machine, markdown
from cbd_trl.trainers.packing import RowMask, attend_within_rows, row_mask
from cbd_trl.utils.files import write_text

HEADS, GROUPS, HEAD_SIZE, TOKENS = 9, 3, 64, 4096
ROW_LENGTHS = (64, 256, 1024)
WAYS = ("dense", "within rows")
_REPEATS = 3


def make_attention(way: str, row_length: int, device: str = "cpu") -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Queries, keys and values of a pack, and their attention, mask included, summed."""
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, TOKENS, HEAD_SIZE, generator=generator).to(device).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    rows = (torch.arange(TOKENS) // row_length)[None].to(device)
    rule = and_masks(causal_mask_function, packed_sequence_mask_function(rows))
    layer = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, is_causal=True)
    bounds = tuple(range(0, TOKENS + 1, row_length)) if way == "within rows" else None

    def attend() -> Tensor:
        mask = row_mask(1, TOKENS, TOKENS, mask_function=rule, allow_is_causal_skip=False, device=device)
        return attend_within_rows(layer, *states, mask, bounds)[0].sum()

    return states, attend


def count_bytes(way: str, row_length: int) -> dict[str, int]:
    """Bytes of the mask, and the peak above the inputs; this process is the strict device's afterwards."""
    from tests.device.backend import install
    from tests.device.tensor import NAME, USAGE, StrictMode

    install()
    with StrictMode():
        states, attend = make_attention(way, row_length, NAME)
        masks: list[int] = []
        whole = RowMask.whole

        def counted(mask: RowMask) -> Tensor | None:
            made = whole(mask)
            masks.append(0 if made is None else made.nbytes)
            return made

        RowMask.whole = counted  # type: ignore[method-assign]
        USAGE.clear()
        before = USAGE.bytes_now
        torch.autograd.grad(attend(), states)
        return {"mask": sum(masks), "peak": USAGE.bytes_peak - before}


def count_flops(way: str, row_length: int) -> float:
    """FLOPs of the matrix products, forward and backward."""
    states, attend = make_attention(way, row_length, "meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.autograd.grad(attend(), states)
    return counter.get_total_flops()


def measure_seconds(row_length: int) -> dict[str, float]:
    """The fastest of some runs of each way, taken in turn, on one thread."""
    runs = {way: make_attention(way, row_length) for way in WAYS}
    seconds = {way: float("inf") for way in WAYS}
    for _ in range(_REPEATS):
        for way, (states, attend) in runs.items():
            start = time.perf_counter()
            torch.autograd.grad(attend(), states)
            seconds[way] = min(seconds[way], time.perf_counter() - start)
    return seconds


def in_child(way: str, row_length: int) -> dict[str, int]:
    """`count_bytes` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.packed_attention", "--child", way, str(row_length)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/packed"), help="folder for the table")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(count_bytes(args.child[0], int(args.child[1]))))
        return
    lines = []
    dense = in_child("dense", ROW_LENGTHS[0])  # whatever the rows are
    for length in ROW_LENGTHS:
        seconds, flops = measure_seconds(length), {way: count_flops(way, length) for way in WAYS}
        bytes_of = {"dense": dense, "within rows": in_child("within rows", length)}
        for way in WAYS:
            ratio = f"{seconds['dense'] / seconds[way]:.1f}"
            sizes = [f"{bytes_of[way][name] / 2**20:.1f}" for name in ("mask", "peak")]
            lines.append([f"{way}, rows of {length}", f"{flops[way] / 1e9:.1f}", *sizes, f"{seconds[way]:.2f}", ratio])
    header = ["attention", "GFLOP", "MiB of mask", "peak MiB", "seconds", "speed / dense"]
    text = markdown(header, lines) + "\n" + machine(1)
    print(text)
    write_text(args.output / "packed_attention.md", text)


if __name__ == "__main__":
    main()
