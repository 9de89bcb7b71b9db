"""What `test_strict_device.py` runs in a process where the strict device is the accelerator.

By hand: `python -m pytest -n 0 tests/device/runs.py`, and never together with tests of other folders.
"""

import gc
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.big_modeling import attach_align_device_hook_on_blocks
from safetensors.torch import load_file

import cbd_trl.build.build as build_module
import cbd_trl.build.source_anchor as source_anchor_module
import cbd_trl.surgery.statistics as statistics_module
from benchmarks import gpu
from cbd_trl import Chain, DistillTrainer, build_chain, from_chain
from cbd_trl.build.width_hybrid import WidthHybrid
from cbd_trl.cache import write_cache
from cbd_trl.losses.held_out import held_out_loss
from tests.build.width_pairs import heavy_pair
from tests.cache.helpers import make_args, token_dataset
from tests.chain.helpers import CHAIN_ANCHORS, DEEP, WIDE, chain_config, chain_rows, chain_source
from tests.device.backend import install
from tests.device.tensor import DEVICE, NAME, USAGE, StrictMode, StrictTensor
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge
from tests.trainers.bridge_runs import teacher as bridge_teacher
from tests.training import make_trainer, text_rows

ON_DEVICE: dict[str, Any] = {"use_cpu": False, "dataloader_pin_memory": False, "optim": "adamw_torch"}
CPU = torch.device("cpu")
# Two steps, with an evaluation after the last.
STEPS = {**ON_DEVICE, "max_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 1.0}

EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": text_rows()}


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    install()


@pytest.fixture(autouse=True)
def strict_device(installed: None) -> Iterator[None]:
    """Whatever runs on it makes no float64 there."""
    with StrictMode():
        USAGE.clear()
        yield
    assert not USAGE.doubles


@pytest.fixture(scope="module")
def strict_chain(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The tiny chain, built on the device."""
    with StrictMode():
        folder = tmp_path_factory.mktemp("strict") / "chain"
        chain = build_chain(
            chain_source(),
            CHAIN_ANCHORS,
            dataset=chain_rows(),
            output_dir=folder,
            args=chain_config(**ON_DEVICE, max_steps=1, save_strategy="no"),
            processing_class=tiny_tokenizer(),
            eval_dataset=chain_rows(4, seed=9),
            calibration_tokens=128,
        )
        assert USAGE.uploads, "the build never used the device"
        assert not USAGE.doubles
        return chain


def logged(trainer: Any) -> list[float]:
    """The losses of training and of evaluation."""
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


def train(trainer: Any) -> None:
    """Train on the device, and see finite losses of training and of evaluation."""
    assert trainer.args.device.type == NAME
    assert all(isinstance(parameter.data, StrictTensor) for parameter in trainer.model.parameters())
    trainer.train()
    losses = logged(trainer)
    assert len(losses) >= 2 and all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="padded"),
        pytest.param({"packing": True, "bf16": True, "hidden_weight": 1.0}, id="packed-bf16-hidden"),
        pytest.param({"divergence": "adaptive_kl", "temperature": 2.0, "loss_chunk_size": 3}, id="adaptive-chunks"),
        pytest.param({"top_k": 8, "gradient_accumulation_steps": 2}, id="top_k"),
    ],
)
def test_distill_trainer(how: dict[str, Any]) -> None:
    train(make_trainer(**{**STEPS, **EVALUATED, **how}))


def test_attention_within_packed_rows_waits_for_nothing() -> None:
    """Nor does it send anything: bounds of rows are known on the host, and windows need no look at a mask."""
    rows = {"packing": True, "max_length": 40, "train_dataset": text_rows((12, 9, 5, 14, 20, 30))}
    trainer = make_trainer("gemma3_text", **{**STEPS, **rows}, gradient_checkpointing=True, swap_probability=1.0)
    USAGE.clear()
    trainer.train()
    places = {place for counter in (USAGE.waits, USAGE.uploads) for _, place in counter}
    assert places and not any("packing.py" in place for place in places)


@pytest.mark.parametrize("objective", ["alm=1,uld=0.5", "shared", "dskd-cma", "prefix"])
def test_bridge_trainer(objective: str) -> None:
    train(make_bridge(**STEPS, objective=objective, logging_steps=1))


@pytest.mark.parametrize(
    ("family", "tied", "what", "dtype", "how"),
    [
        pytest.param("llama", True, "width", torch.float32, {}, id="llama"),
        pytest.param("qwen3", False, "both", torch.bfloat16, {"gradient_checkpointing": True}, id="qwen3-deep"),
        pytest.param(
            "gemma2", True, "width", torch.float32, {"bf16": True}, id="gemma2-autocast", marks=pytest.mark.slow
        ),
        pytest.param(
            "qwen3", False, "width", torch.bfloat16, {"gradient_accumulation_steps": 2}, id="qwen3-twice",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_memory_of_a_width_step(family: str, tied: bool, what: str, dtype: torch.dtype, how: dict[str, Any]) -> None:
    """At most half as much again as teacher, student, its gradient and its optimizer take; and no wait of its own."""
    student, teacher, pair = heavy_pair(family, tied, what, dtype)
    options = {**ON_DEVICE, "max_steps": 2, "per_device_train_batch_size": 1, "gradient_checkpointing": False}
    gc.collect()
    USAGE.clear()
    before, held = USAGE.bytes_now, teacher.num_parameters() + 4 * student.num_parameters()
    hybrid = WidthHybrid(pair, 1.0, seed=42)
    options |= {"hybrid": hybrid, "swap_probability": 1.0, "block_map": pair.blocks, **how}
    trainer = make_trainer(student=student, teacher=teacher, **options)
    trainer.train()
    assert all(entry["hybrid"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert held * dtype.itemsize < USAGE.bytes_peak - before < 1.5 * held * dtype.itemsize
    made = ("build/width_hybrid", "targets/operators", "surgery/")
    assert not [place for _, place in USAGE.waits if any(name in place for name in made)]


@pytest.mark.parametrize("tied", [True, False])
def test_public_anchors(tied: bool, tmp_path: Path) -> None:
    """One of fewer layers, whose blocks are measured, and one narrower; an untied one is rotated first."""
    shared: dict[str, Any] = {"tie_word_embeddings": tied, "num_hidden_layers": 2}
    lower = [tiny_model("llama", seed=2, **shared), tiny_model("llama", seed=3, hidden_size=24, **shared)]
    chain = build_chain(
        tiny_model("llama", tie_word_embeddings=tied),
        lower,
        dataset=chain_rows(),
        output_dir=tmp_path / "chain",
        args=chain_config(**ON_DEVICE, max_steps=1, save_strategy="no"),
        processing_class=tiny_tokenizer(),
        calibration_tokens=128,
    )
    assert [anchor.apart for anchor in chain.anchors] == [False, True, True]
    assert chain.anchors[1].block_costs is not None


def test_build_chain(strict_chain: Chain) -> None:
    reopened = Chain.from_pretrained(strict_chain.path)
    assert len(reopened.anchors) == 1 + len(CHAIN_ANCHORS)
    assert all(tensor.isfinite().all() for anchor in reopened.anchors for tensor in anchor.load_model().parameters())


@pytest.mark.parametrize("operator", ["patch", "linear", "expand", "slice"])
def test_from_chain(strict_chain: Chain, operator: str) -> None:
    shape = DEEP if operator == "patch" else WIDE
    model = from_chain(strict_chain, config=shape, operator=operator).to(NAME)
    assert model(torch.zeros(1, 4, dtype=torch.long, device=NAME)).logits.isfinite().all()


@pytest.mark.slow
def test_benchmark(tmp_path: Path) -> None:
    """What a GPU user is asked to run: all of it works on a device, and counts the bytes there."""
    file = tmp_path / "table.md"
    gpu.main(["--toy", "--steps", "1", "--warm-up", "1", "--output", str(file)])
    (rows,) = json.loads(file.with_suffix(".json").read_text(encoding="utf-8")).values()
    assert not [row for row in rows.values() if row.get("failed")], file.read_text(encoding="utf-8")
    assert all(row["device_bytes"] > 0 for row in rows.values() if row["section"] != "from_chain")
    assert {row["section"] for row in rows.values()} == set(gpu.SECTIONS)


def test_from_chain_calibrated(strict_chain: Chain) -> None:
    made = from_chain(strict_chain, config=WIDE, calibration_dataset=chain_rows(2))
    assert USAGE.uploads, "the calibration never used the device"
    assert all(parameter.isfinite().all() for parameter in made.parameters())


def spread(model: Any, tied_apart: bool = False) -> Any:
    """The model over two devices, as `device_map="auto"` leaves it: the CPU stands for a second accelerator.

    Args:
        model: of the Llama or the GPT-NeoX family.
        tied_apart: put the head with the table of embeddings, and the last norm with the other half.
    """
    names = {
        "llama": ("model", "embed_tokens", "norm", "lm_head"),
        "gpt_neox": ("gpt_neox", "embed_in", "final_layer_norm", "lm_head"),
    }
    base, table, norm, head = names[model.config.model_type]
    depth = model.config.num_hidden_layers
    places = {f"{base}.{table}": DEVICE, f"{base}.rotary_emb": DEVICE, f"{base}.{norm}": CPU}
    places |= {f"{base}.layers.{i}": DEVICE if 2 * i < depth else CPU for i in range(depth)}
    places[head] = DEVICE if tied_apart else CPU
    for name, place in places.items():
        model.get_submodule(name).to(place)
    hooked = {"execution_device": {"": DEVICE, **places}, "offload": dict.fromkeys(places, False)}
    attach_align_device_hook_on_blocks(model, **hooked)
    model.hf_device_map = {name: int(place is CPU) for name, place in places.items()}
    return model


@pytest.mark.parametrize(
    ("how", "tied_apart"),
    [({"packing": True}, False), ({"hidden_weight": 1.0, "bf16": True}, False), ({}, True)],
    ids=["packed", "hidden-bf16", "head-in-front"],
)
def test_a_teacher_over_two_devices(how: dict[str, Any], tied_apart: bool) -> None:
    """It teaches what it teaches in one piece."""
    losses = []
    for teacher in (tiny_model("llama", seed=2), spread(tiny_model("llama", seed=2), tied_apart)):
        trainer = make_trainer(teacher=teacher, **{**STEPS, **EVALUATED, **how})
        train(trainer)
        losses.append(logged(trainer))
    # The kernels of the two devices round in their own way.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if "bf16" in how else 1e-5)
    assert {parameter.device.type for parameter in teacher.parameters()} == {NAME, "cpu"}


def test_teachers_over_two_devices() -> None:
    """An ensemble, of which one member is spread."""
    teachers = [tiny_model("llama", seed=2), spread(tiny_model("llama", seed=3))]
    train(make_trainer(teacher=teachers, **STEPS, **EVALUATED))


@pytest.mark.parametrize("objective", ["alm=1,uld=0.5", "dskd-cma", "prefix"])
def test_a_teacher_of_a_bridge_over_two_devices(objective: str) -> None:
    how = {**STEPS, "objective": objective, "logging_steps": 1}
    train(
        make_bridge(
            teacher_model=spread(bridge_teacher()), **how, hidden_weight=0.0 if objective == "dskd-cma" else None
        )
    )


def test_a_student_over_two_devices() -> None:
    """As TRL loads one by name, where a process has several."""
    losses = []
    for student in (tiny_model("llama", seed=1), spread(tiny_model("llama", seed=1))):
        trainer = make_trainer(student=student, **STEPS, hidden_weight=1.0)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_layers_over_two_devices_are_not_swapped() -> None:
    with pytest.raises(ValueError, match="the teacher is spread by its device_map over 0, 1"):
        make_trainer(teacher=spread(tiny_model("llama", seed=2)), **STEPS, swap_probability=0.5)
    with pytest.raises(ValueError, match="teacher_offload=True keeps the teacher in the CPU's memory"):
        make_trainer(teacher=spread(tiny_model("llama", seed=2)), **STEPS, teacher_offload=True)


def test_a_cache_of_a_teacher_over_two_devices(tmp_path: Path) -> None:
    rows = []
    for teacher in (tiny_model("llama"), spread(tiny_model("llama"), tied_apart=True)):
        folder = tmp_path / str(len(rows))
        write_cache(teacher, token_dataset(3), folder, args=make_args(folder, use_cpu=False), kind="hidden")
        rows.append(load_file(next(folder.glob("rows-*"))))
    for name in ("hidden", "target", "tokens"):
        torch.testing.assert_close(rows[0][name], rows[1][name], rtol=1e-4, atol=1e-5)


def test_what_is_on_the_device_while_statistics_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An anchor's model and one group of second moments: nothing of its training, no other copy, no other group."""
    store, trainers, found = build_module.store_anchor, [], []
    start = DistillTrainer.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        trainers.append(weakref.ref(self))
        start(self, *args, **kwargs)

    def watched(folder: Path, record: Any, model: Any, *args: Any) -> Any:
        weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        before = USAGE.bytes_now
        USAGE.bytes_peak = before
        anchor = store(folder, record, model, *args)
        found.append((weights, before, USAGE.bytes_peak - before, [trainer() for trainer in trainers]))
        return anchor

    monkeypatch.setattr(DistillTrainer, "__init__", made)
    monkeypatch.setattr(build_module, "store_anchor", watched)
    monkeypatch.setattr(source_anchor_module, "store_anchor", watched)
    # Of 6.7 MB for the six layers of the source.
    budget = 4_700_000
    monkeypatch.setattr(statistics_module, "free_bytes", lambda device: 2 * budget)
    source = tiny_model("llama", num_hidden_layers=6, intermediate_size=512, tie_word_embeddings=False)
    held = USAGE.bytes_now
    build_chain(
        source,
        [{"num_hidden_layers": 4, "hidden_size": 24}],
        dataset=chain_rows(),
        output_dir=tmp_path / "chain",
        args=chain_config(**ON_DEVICE, max_steps=1, save_strategy="no"),
        processing_class=tiny_tokenizer(),
        calibration_tokens=128,
    )
    assert len(found) == 2 and len(trainers) == 1
    for weights, before, during, alive in found:
        assert not any(alive)
        assert before - held <= 1.02 * weights
        # Streams of the text come on top.
        assert 0.5 * budget < during < 1.15 * budget


def test_a_planted_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor made without saying where, which no CPU notices, ends a training."""
    stock = DistillTrainer.compute_loss
    monkeypatch.setattr(DistillTrainer, "compute_loss", lambda *a, **k: stock(*a, **k) + torch.zeros(1))
    with pytest.raises(RuntimeError, match=f"{NAME}:0 and cpu"):
        train(make_trainer(**STEPS))


def test_what_is_counted() -> None:
    """Waits, uploads and float64 by operation and place; bytes as long as somebody holds them."""
    before = USAGE.bytes_now
    table = torch.ones(4, 8).to(NAME)
    assert USAGE.bytes_now - before == table.nbytes == 128 and USAGE.bytes_peak >= USAGE.bytes_now
    view = table[1:]
    assert USAGE.bytes_now - before == 128
    assert sum(USAGE.uploads.values()) == 1 and not USAGE.waits
    assert table[table > 0].sum().item() == 32
    assert view[torch.tensor([0])].double().cpu().sum() == 8
    operations = {operation for operation, place in USAGE.waits}
    assert operations == {
        "aten::index by a mask",
        "aten::_local_scalar_dense",
        "aten::index by an index on the host",
        "aten::_to_copy to the host",
    }
    assert [operation for operation, place in USAGE.doubles] == ["aten::_to_copy"]
    USAGE.doubles.clear()
    del table, view
    assert USAGE.bytes_now == before


def test_a_count_names_the_line() -> None:
    """The line of cbd_trl that asked for it, however deep in torch it was done."""
    held_out_loss(tiny_model("llama").to(NAME), torch.randint(0, 64, (2, 16)))
    places = {place for counter in (USAGE.waits, USAGE.uploads) for _, place in counter}
    file = held_out_loss.__module__.replace(".", "/") + ".py:"
    assert any(place.startswith(file) for place in places)
    root = Path(__file__).parents[2]
    for file, _, line in (place.partition(":") for place in places if place.startswith("cbd_trl/")):
        assert (root / file).read_text(encoding="utf-8").splitlines()[int(line) - 1].strip()


def test_host_and_device_do_not_mix() -> None:
    on_device, on_host = torch.ones(3, 4, device=NAME), torch.ones(4)
    for mixed in (
        lambda: on_device + on_host,
        lambda: on_device @ on_host,
        lambda: on_host[on_device[0].long()],
        lambda: torch.cat([on_device[0], on_host]),
        lambda: on_device.index_put_((on_device[0, :1].long(),), on_host),
    ):
        with pytest.raises(RuntimeError, match=f"{NAME}:0 and cpu"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        on_device.numpy()
    # As on CUDA: a scalar goes along, and an index is copied.
    assert (on_device * torch.tensor(2.0)).sum().item() == 24
    assert on_device[torch.tensor([2])].shape == (1, 4)
