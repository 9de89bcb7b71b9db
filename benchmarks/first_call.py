"""One model made or loaded in a fresh process, measured: a part of from_chain_speed.py.

    python benchmarks/first_call.py '{"threads": 2, "stock": DIR}'
    python benchmarks/first_call.py '{"threads": 2, "chain": DIR, "config": {...}, "operator": "nested", "save": DIR}'

Imports what a user of either would, no more: what is imported before the call does not count as its time.
"""

import json
import sys
import time

import torch
from memory import PeakSampler, resident_bytes
from transformers import AutoModelForCausalLM

from cbd_trl import from_chain


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    before = resident_bytes()
    sampler = PeakSampler()
    sampler.start()
    start = time.perf_counter()
    if "stock" in request:
        model = AutoModelForCausalLM.from_pretrained(request["stock"])
    else:
        model = from_chain(request["chain"], config=request["config"], operator=request["operator"])
    seconds = time.perf_counter() - start
    above = sampler.stop() - before
    if "save" in request:
        model.save_pretrained(request["save"])
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"seconds": seconds, "above": above, "bytes": size, "parameters": model.num_parameters()}))


if __name__ == "__main__":
    main()
