"""Half of a build, run twice by `test_two_processes.py` under torchrun."""

import sys
from pathlib import Path
from typing import Any

import torch

from cbd_trl import Chain, build_chain, consolidate_chain
from tests.build.bridged import bridge_config, bridge_step, build_bridged
from tests.chain.helpers import build_tiny_chain, chain_config, chain_rows, chain_source
from tests.processes import settle
from tests.tokenizer import tiny_tokenizer
from tests.trainers.launched import SHARDING, shard_on_cpu

# SGD, because two ways of adding up a gradient of almost 0 are two steps of Adam.
_SGD = {"optim": "sgd", "learning_rate": 0.1}


def _bridged(folder: Path, processes: int) -> Chain:
    """Depth alone differs below: what a cut in width makes of rounding in the anchor above is a thousandth of the
    loss."""
    how: dict[str, Any] = {**_SGD, "per_device_train_batch_size": 4 // processes}
    options = {"anchors": [{"n_layer": 3}], "args": chain_config(**how)}
    return build_bridged(folder, bridge=bridge_step(args=bridge_config(**how)), **options)


def _sharded(folder: Path, processes: int) -> Chain:
    """The trainings under FSDP 2 where there are two processes."""
    how: dict[str, Any] = {**_SGD, "per_device_train_batch_size": 4 // processes, "swap_probability": 0.0}
    if processes > 1:
        shard_on_cpu()
        how |= {"fsdp": True, "fsdp_config": dict(SHARDING)}
    return build_chain(
        chain_source(),
        [{"num_hidden_layers": 4}, {"num_hidden_layers": 3}],
        dataset=chain_rows(),
        output_dir=folder,
        args=chain_config(**how),
        processing_class=tiny_tokenizer(),
        eval_dataset=chain_rows(4, seed=9),
        calibration_tokens=256,
    )


def _consolidated(folder: Path, processes: int) -> Chain:
    """Of the chain that a single process, the first to come, has built beside it."""
    source = folder.parent / "source"
    if not source.exists():
        build_tiny_chain(source)
    how: dict[str, Any] = {**_SGD, "per_device_train_batch_size": 4 // processes, "max_steps": 6}
    options: dict[str, Any] = {"eval_dataset": chain_rows(4, seed=9), "calibration_tokens": 256}
    return consolidate_chain(source, chain_rows(), output_dir=folder, args=chain_config(**how), **options)


BUILDS = {"bridged": _bridged, "sharded": _sharded, "consolidated": _consolidated}


def build(kind: str, folder: Path, processes: int) -> Chain:
    """A chain of the tests, in steps of four rows that so many processes share.

    Args:
        kind: one of `BUILDS`.
        folder: of the chain.
        processes: how many.
    """
    return BUILDS[kind](folder, processes)


if __name__ == "__main__":
    settle()
    build(sys.argv[1], Path(sys.argv[2]), processes=2)
    torch.distributed.barrier()  # who leaves early takes the sockets of the other away
    torch.distributed.destroy_process_group()
