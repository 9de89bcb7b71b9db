"""Nothing that is written to be shared says where it lay: models, chains, caches, corpora and cards."""

import copy
import json
from pathlib import Path

import pytest
from datasets import load_dataset
from peft import LoraConfig, get_peft_model

from cbd_trl import BridgeStep, Chain, DistillTrainer, build_chain, chain_from_anchors, from_chain
from cbd_trl.bridge import reduce_vocabulary, transplant_vocabulary
from cbd_trl.cache import write_cache
from cbd_trl.generation import DecodingConfig, generate_completions
from cbd_trl.targets.many import make_targets
from tests.build.bridged import ANCHORS, anchor_zero, bridge_config, source
from tests.chain.helpers import CHAIN_ANCHORS, DEEP, WIDE, chain_config, chain_source
from tests.tiny import tiny_model
from tests.tokenizer import WORDS, tiny_tokenizer
from tests.trainers.bridge_runs import students_tokenizer, teachers_tokenizer, texts
from tests.training import make_config

# Of a home that its owner tells nobody about.
SECRET = "ada-lovelace"
# What a trainer writes for itself: its arguments, with the folder that it writes to.
OF_A_RUN = ("training_args.bin",)


def _saved(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _rows(file: Path, lines: list[str]):
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent / "datasets"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with all that there is to write, made from folders in it."""
    home = tmp_path_factory.mktemp("home") / SECRET
    home.mkdir()
    rows = _rows(home / "rows.jsonl", [" ".join(WORDS[i : i + 9]) for i in range(24)])
    start = _saved(home / "source", chain_source(), tiny_tokenizer())
    args = chain_config(max_steps=1, output_dir=str(home / "out"))
    chain = build_chain(
        start, CHAIN_ANCHORS, dataset=rows, output_dir=home / "chain", args=args, calibration_tokens=128
    )
    chain.save_pretrained(home / "copied")
    lower = _saved(home / "lower", tiny_model("llama", num_hidden_layers=4, seed=3), tiny_tokenizer())
    chain_from_anchors([start, lower], dataset=rows, output_dir=home / "apart", calibration_tokens=128)
    bridged = BridgeStep(
        _saved(home / "zero", anchor_zero(), students_tokenizer()),
        args=bridge_config(max_steps=1, output_dir=str(home / "out")),
    )
    build_chain(
        _saved(home / "far", source(), teachers_tokenizer()), ANCHORS, dataset=_rows(home / "far.jsonl", texts(8)),
        output_dir=home / "bridged", args=args, bridge=bridged, calibration_tokens=128,
    )  # fmt: skip
    from_chain(str(home / "chain"), config=DEEP, save_directory=home / "target")
    made = from_chain(Chain.from_pretrained(home / "chain"), config=WIDE)
    make_targets(home / "chain", [made.num_parameters()], home / "targets", tolerance=0.3)
    base = from_chain(home / "chain", config=DEEP)
    made.save_pretrained(home / "by_hand")
    get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(home / "adapter")
    options = {"output_dir": str(home / "trained"), "save_strategy": "no"}
    for student, place in ((str(home / "lower"), "trained"), (made, "trained_made")):
        trainer = DistillTrainer(student, start, make_config(**options), train_dataset=rows)
        trainer.train()
        trainer.save_model(str(home / place))
        trainer.create_model_card()
    write_cache(start, rows, home / "cache", args=make_config(**options), k=4)
    generate_completions(
        start, rows, home / "corpus.jsonl", prompt_tokens=2, decoding=DecodingConfig(max_new_tokens=3), use_cpu=True
    )
    old, new = teachers_tokenizer(), students_tokenizer()
    far = source().from_pretrained(home / "far")
    _saved(home / "transplanted", transplant_vocabulary(far, old, new), new)
    reduced = reduce_vocabulary(far, old, texts(20), 350)
    _saved(home / "reduced", reduced.model, reduced.tokenizer)
    return home


@pytest.mark.filterwarnings("ignore:Could not find a config file in .* made in memory and saved nowhere:UserWarning")
def test_no_file_holds_the_path_of_the_home(home):
    written = [file for file in home.rglob("*") if file.is_file() and "datasets" not in file.parts]
    names = {file.name for file in written}
    assert {"config.json", "chain.json", "README.md", "adapter_config.json", "tokenizer_config.json"} <= names
    told = [str(file.relative_to(home)) for file in written if SECRET.encode() in file.read_bytes()]
    assert [name for name in told if Path(name).name not in OF_A_RUN] == []
