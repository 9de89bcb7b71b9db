"""Half of a build, run twice by `test_two_processes.py` under torchrun."""

import sys
from pathlib import Path

import torch

from cbd_trl import Chain
from tests.chain.bridged import bridge_config, bridge_step, build_bridged
from tests.chain.helpers import chain_config


def build(folder: Path, processes: int) -> Chain:
    """The bridged chain of the tests, in steps of four rows that so many processes share.

    Depth alone differs below: what a cut in width makes of rounding in the anchor above is a thousandth of the loss.
    """
    # SGD, because two ways of adding up a gradient of almost 0 are two steps of Adam.
    how = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 4 // processes}
    options = {"anchors": [{"n_layer": 3}], "args": chain_config(**how)}
    return build_bridged(folder, bridge=bridge_step(args=bridge_config(**how)), **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    build(Path(sys.argv[1]), processes=2)
    torch.distributed.barrier()  # who leaves early takes the sockets of the other away
    torch.distributed.destroy_process_group()
