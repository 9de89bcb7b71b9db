"""A process that writes one of everything: `python -m tests.build.everything INPUTS FOLDER`."""

import os
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from cbd_trl import Chain, chain_from_anchors, from_chain
from cbd_trl.cache import write_cache
from cbd_trl.cli.main import main
from cbd_trl.generation import DecodingConfig, generate_completions
from cbd_trl.targets.many import make_targets
from tests.build.bridged import build_bridged
from tests.chain.helpers import DEEP, WIDE, chain_config, chain_rows, chain_source
from tests.processes import settle
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import make_trainer


def write_everything(inputs: Path, folder: Path) -> None:
    """Chains of every kind, targets, a report, a cache of each kind, completions and checkpoints.

    Args:
        inputs: with a recipe and what it names.
        folder: where all of it goes.
    """
    # A chain with an anchor less deep and one less wide, measured.
    recipe = ["build", str(inputs / "recipe.yaml"), "--set", f"output_dir={folder / 'chain'}"]
    assert main([*recipe, "--set", "evaluation.sizes=[30000]"]) == 0
    held_out = ["--data", str(inputs / "held.jsonl"), "--blocks", "2", "--block_length", "16"]
    assert main(["report", str(folder / "chain"), *held_out, "--output", str(folder / "report")]) == 0
    build_bridged(folder / "bridged", eval_dataset=None)
    text: dict[str, Any] = {"dataset": chain_rows(), "processing_class": tiny_tokenizer()}
    apart: list[Any] = [tiny_model("llama", seed=seed, num_hidden_layers=depth) for seed, depth in ((0, 4), (1, 2))]
    chain_from_anchors(apart, output_dir=folder / "apart", calibration_tokens=64, **text)
    # By a name that is the same in both places.
    os.chdir(folder)
    chain = Chain.from_pretrained("chain")
    chain.save_pretrained(folder / "copy")
    from_chain(chain, config=DEEP, save_directory=folder / "deep")
    from_chain(chain, config=WIDE, calibration_dataset=chain_rows(6), save_directory=folder / "wide")
    make_targets(chain, [20_000], folder / "many", tolerance=1.0)
    for kind in ("top_k", "sampled", "hidden"):
        write_cache(chain_source(), output_dir=folder / f"cache-{kind}", kind=kind, k=4, args=chain_config(), **text)
    prompts, decoding = Dataset.from_dict({"prompt": ["w1 w2", "w3"]}), DecodingConfig(max_new_tokens=6)
    place = {"use_cpu": True, "disable_tqdm": True, "processing_class": tiny_tokenizer(), "decoding": decoding}
    generate_completions(chain_source(), prompts, folder / "completions.jsonl", **place)  # type: ignore[arg-type]
    saving = {"output_dir": str(folder / "run"), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(**saving, hidden_weight=1.0, hidden_projector=True)
    trainer.train()
    trainer.save_model(str(folder / "run" / "end"))


if __name__ == "__main__":
    settle()
    write_everything(Path(sys.argv[1]), Path(sys.argv[2]))
