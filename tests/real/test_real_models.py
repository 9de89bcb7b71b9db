"""Chains, bridges and exports of real checkpoints: of every model folder in the folder that CBD_REAL_MODELS names.

    CBD_REAL_MODELS=models make real-models
    CBD_REAL_MODELS=models python -m pytest tests/real -n 0

What the tests of all families prove on random weights is proved here on trained ones, whose streams have channels a
thousand times as large as others. A model takes minutes on two cores, and up to 7 GB.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.real_models import SMOLLM2
from cbd_trl import BridgeDistillConfig, BridgeDistillTrainer, Chain, build_chain, from_chain
from cbd_trl.bridge import carry_over_special_tokens, reduce_vocabulary, transplant_vocabulary
from cbd_trl.cli.main import main
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.recipe.corpus import read_rows
from cbd_trl.report.measure import bits_per_byte, held_out_blocks, scored_bytes
from tests.gguf_files import write_gguf
from tests.training import make_config

FOLDER = os.environ.get("CBD_REAL_MODELS")
NAMES = sorted(file.parent.name for file in Path(FOLDER).glob("*/config.json")) if FOLDER else []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NAMES, reason="CBD_REAL_MODELS names no folder with models: make real-models"),
]
STEPS, LENGTH = 3, 64
# Adafactor: its state is no larger than a row and a column of each matrix.
TRAINING: dict[str, Any] = {
    "max_steps": STEPS,
    "max_length": LENGTH,
    "per_device_train_batch_size": 2,
    "optim": "adafactor",
    "learning_rate": 1e-4,
}


def texts(first: int, count: int) -> list[str]:
    """Rows of the corpus that the package ships, as plain text."""
    rows = read_rows(first + count)[first:]
    return [f"{row['prompt']}\n{row['completion']}" for row in rows]


# Of the rows of the corpus, in order.
TRAINED, HELD_OUT = texts(0, 60), texts(60, 20)


def load(place: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), AutoTokenizer.from_pretrained(place)


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    """Of the last 16 of 48 tokens, (16, V)."""
    ids = tokenizer(HELD_OUT[0], return_tensors="pt")["input_ids"][:, :48]
    return model(input_ids=ids, logits_to_keep=16).logits[0]


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.std()).item()


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert difference(found, expected) <= tolerance


@torch.no_grad()
def rounding(model: Any, tokenizer: Any) -> float:
    """What the last bit of each weight changes in the logits: a cut of a trained model amplifies it."""
    before = logits(model, tokenizer)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter *= 1 + 2**-24 * torch.randn_like(parameter)
    return difference(logits(model, tokenizer), before)


def bits(model: Any, tokenizer: Any, rows: list[str], blocks: int = 4) -> float:
    """Bits per byte of the first blocks of 64 tokens."""
    found = held_out_blocks(tokenizer, rows, LENGTH, blocks)
    count = scored_bytes(tokenizer, found)
    assert count is not None
    return bits_per_byte(held_out_loss(model, found), found.scored, count)


@pytest.fixture(scope="module", params=NAMES or [""])
def place(request: pytest.FixtureRequest) -> Path:
    """The folder of a source."""
    return Path(FOLDER or "", request.param)


def narrower(config: Any, share: float) -> dict[str, int]:
    """Config fields of a width and an FFN width of about this share, its heads as they are."""
    heads = config.num_attention_heads
    width = int(config.hidden_size * share / heads) * heads
    return {"hidden_size": width, "intermediate_size": int(config.intermediate_size * share / 64) * 64}


@pytest.fixture(scope="module")
def chain(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Two thirds of the layers, then three quarters of the width."""
    source, tokenizer = load(place)
    depth = source.config.num_hidden_layers * 2 // 3
    folder = tmp_path_factory.mktemp(place.name)
    # Fewer tokens than channels would leave the cut in width undetermined.
    return build_chain(
        source,
        [{"num_hidden_layers": depth}, narrower(source.config, 0.75)],
        dataset=Dataset.from_dict({"text": TRAINED}),
        output_dir=folder / "chain",
        args=make_config(**TRAINING, output_dir=str(folder / "training")),
        processing_class=tokenizer,
        eval_dataset=Dataset.from_dict({"text": HELD_OUT[:4]}),
        calibration_tokens=2048,
    )


def between(chain: Chain) -> list[dict[str, int]]:
    """A target in the middle of each pair."""
    source, shallow = chain.anchors[0].config(), chain.anchors[1].config()
    depth = (source.num_hidden_layers + shallow.num_hidden_layers) // 2
    return [
        {"num_hidden_layers": depth},
        {"num_hidden_layers": shallow.num_hidden_layers, **narrower(source, 0.875)},
    ]


def test_the_source_of_the_chain_is_the_source(place: Path, chain: Chain) -> None:
    source, tokenizer = load(place)
    assert_same(logits(chain.anchors[0].load_model(), chain.tokenizer()), logits(source, tokenizer))


@pytest.mark.parametrize("pair", [0, 1], ids=["depth", "width"])
def test_an_expanded_anchor_is_the_anchor(chain: Chain, pair: int) -> None:
    tokenizer, anchor = chain.tokenizer(), chain.anchors[pair + 1].load_model()
    expanded = from_chain(chain, config=between(chain)[pair], operator="expand")
    expected = logits(anchor, tokenizer)
    assert_same(logits(expanded, tokenizer), expected, max(1e-5, 4 * rounding(anchor, tokenizer)))


def test_anchors_and_targets_know_the_language(chain: Chain) -> None:
    tokenizer = chain.tokenizer()
    found = {anchor.name: bits(anchor.load_model(), tokenizer, HELD_OUT) for anchor in chain.anchors}
    found |= {str(fields): bits(from_chain(chain, config=fields), tokenizer, HELD_OUT) for fields in between(chain)}
    print(found)
    source, shallow, narrow, deep, wide = found.values()
    assert source < shallow < narrow
    # A model that knows nothing is at 8 or more.
    assert narrow < 5
    assert source < deep < shallow
    assert shallow < wide < narrow


@pytest.mark.parametrize("pair", [0, 1], ids=["depth", "width"])
def test_a_target_is_saved_read_back_and_generates(chain: Chain, tmp_path: Path, pair: int) -> None:
    made = from_chain(chain, config=between(chain)[pair], save_directory=tmp_path)
    back, tokenizer = load(tmp_path)
    assert torch.equal(logits(back, tokenizer), logits(made, tokenizer))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = [model.generate(**prompt, max_new_tokens=8, do_sample=False)[0] for model in (made, back)]
    assert torch.equal(*written) and len(written[0]) > prompt["input_ids"].shape[1]
    assert tokenizer.decode(written[0], skip_special_tokens=True).startswith("The capital of France is")


def test_the_report_measures_every_size(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "held-out.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in HELD_OUT))
    flags = ["--operators", "nested", "--blocks", "2", "--block_length", str(LENGTH)]
    code = main(["report", str(chain.path), "--data", str(file), "--output", str(tmp_path / "out"), *flags])
    assert code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())["chains"][0]
    # Between depths whose layers llama.cpp cannot place (Gemma's) no sizes are listed.
    assert len(report["anchors"]) == 3 and len(report["targets"]) >= 3
    for entry in report["targets"]:
        assert 0 < entry["bits_per_byte"]["nested"] < 5


def test_a_target_goes_through_gguf_and_back(chain: Chain, tmp_path: Path) -> None:
    tokenizer = chain.tokenizer()
    # transformers reads no head size of Qwen2 out of GGUF: it takes the width by the heads.
    pair = 0 if chain.model_type == "qwen2" else 1
    made = from_chain(chain, config=between(chain)[pair], save_directory=tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert_same(logits(back, tokenizer), logits(made, tokenizer))


def bridged(
    student: PreTrainedModel, tokenizer: Any, teacher: PreTrainedModel, teacher_tokenizer: Any, folder: Path
) -> tuple[float, float]:
    """Bits per byte of the student before and after a few steps on one batch of text: on that text."""
    rows = TRAINED[:2]
    before = bits(student, tokenizer, rows, blocks=1)
    trainer = BridgeDistillTrainer(
        student,
        teacher,
        BridgeDistillConfig(
            # Gemma goes past its goal with more.
            **TRAINING | {"learning_rate": 2e-5}, output_dir=str(folder), use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant",
        ),
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kd" in entry]
    print([{key: round(entry[key], 4) for key in ("loss", "kd", "ce", "teacher_ce", "unaligned")} for entry in logs])
    assert logs[0]["unaligned"] < 0.05
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    assert logs[-1]["loss"] < logs[0]["loss"]
    return before, bits(trainer.model, tokenizer, rows, blocks=1)


@pytest.fixture
def other(place: Path) -> Path:
    """SmolLM2, for the others."""
    if place.name == SMOLLM2 or SMOLLM2 not in NAMES:
        pytest.skip(f"a bridge is between {SMOLLM2} and another model")
    return place.parent / SMOLLM2


@pytest.mark.parametrize("backward", [False, True], ids=["from SmolLM2", "to SmolLM2"])
def test_a_bridge_to_another_tokenizer(place: Path, other: Path, tmp_path: Path, backward: bool) -> None:
    teacher, student = (place, other) if backward else (other, place)
    before, after = bridged(*load(student), *load(teacher), tmp_path)
    print(before, after)
    assert after < before


@pytest.mark.parametrize("backward", [False, True], ids=["of SmolLM2", "to SmolLM2"])
def test_a_transplanted_vocabulary(place: Path, other: Path, tmp_path: Path, backward: bool) -> None:
    giver, taker = (place, other) if backward else (other, place)
    model, tokenizer = load(taker)
    new = carry_over_special_tokens(tokenizer, AutoTokenizer.from_pretrained(giver))
    moved = transplant_vocabulary(model, tokenizer, new)
    own = bits(model, tokenizer, TRAINED[:2], blocks=1)
    before, after = bridged(moved, new, model, tokenizer, tmp_path)
    print(own, before, after)
    assert own < before < 4 and after < before


def test_a_reduced_vocabulary(place: Path, tmp_path: Path) -> None:
    model, tokenizer = load(place)
    reduced = reduce_vocabulary(model, tokenizer, TRAINED, 2048, held_out=HELD_OUT)
    assert reduced.parameters[1] < reduced.parameters[0] and 0.5 < reduced.covered <= 1
    own = bits(model, tokenizer, TRAINED[:2], blocks=1)
    before, after = bridged(reduced.model, reduced.tokenizer, model, tokenizer, tmp_path)
    print(reduced, own, before, after)
    assert own < before < 4 and after < before
