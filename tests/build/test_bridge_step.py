"""A chain whose source has another tokenizer: anchor zero is distilled across, everything below it as ever."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, GPT2LMHeadModel, TrainerCallback
from trl import SFTConfig

import cbd_trl.build.bridge_step as bridge_module
import cbd_trl.build.build as build_module
from cbd_trl import BridgeDistillTrainer, BridgeStep, Chain, from_chain
from cbd_trl.build.arguments import training_record
from cbd_trl.surgery.statistics_file import StoredStatistics
from cbd_trl.utils.blocks import token_blocks
from cbd_trl.utils.tokenizers import tokenizer_hash
from tests.bridge.tokenizers_of_kinds import make_tokenizer
from tests.build.bridged import anchor_zero, bridge_config, bridge_step, build_bridged, rows, source
from tests.chain.helpers import chain_config, same_weights
from tests.surgery.helpers import logits
from tests.tiny import tiny_model
from tests.trainers.bridge_runs import students_tokenizer, teachers_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bridged") / "chain"
    build_bridged(path)
    return path


@pytest.fixture(scope="module")
def chain(folder: Path) -> Chain:
    return Chain.from_pretrained(folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "chain"))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(bridge_module, "BridgeDistillTrainer", fail)
    monkeypatch.setattr(build_module, "DistillTrainer", fail)


def test_from_the_source_to_a_target(chain: Chain, tmp_path: Path) -> None:
    upper, lower = chain.anchors
    assert chain.model_type == "gpt2" and [anchor.shape["n_embd"] for anchor in chain.anchors] == [32, 16]
    between = (upper.num_parameters + lower.num_parameters) / 2
    model = from_chain(chain, num_parameters=between, save_directory=tmp_path / "target")
    assert isinstance(model, GPT2LMHeadModel) and model.num_parameters() == pytest.approx(between, rel=0.03)
    assert logits(model).isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert tokenizer.get_vocab() == students_tokenizer().get_vocab() != teachers_tokenizer().get_vocab()
    assert tokenizer.chat_template == students_tokenizer().chat_template


def test_anchor_zero_is_what_the_trainer_makes(chain: Chain) -> None:
    student = anchor_zero()
    before = logits(anchor_zero())
    trainer = BridgeDistillTrainer(
        student,
        source(),
        bridge_config(save_strategy="no"),
        train_dataset=rows(seed=5),
        processing_class=students_tokenizer(),
        teacher_processing_class=teachers_tokenizer(),
    )
    trainer.train()
    expected, found = logits(student.eval()), logits(chain.source.load_model())
    assert (found - expected).abs().max() <= 1e-3 * expected.std()
    assert (found - before).abs().max() > 0.1 * expected.std()


def test_text_of_the_source_is_enough(tmp_path: Path) -> None:
    config = bridge_config(objective="seqkd", max_steps=1)
    zero = build_bridged(tmp_path, bridge=bridge_step(args=config)).anchors[0]
    assert zero.training["bridge"]["arguments"]["values"]["objective"] == '{"seqkd": 1.0}' and "ce" in zero.losses
    assert "kd" not in zero.losses


def test_what_chain_json_tells_of_it(chain: Chain) -> None:
    anchor, lower = chain.anchors
    assert (anchor.parent, anchor.block_map) == (None, None)
    assert {"loss", "kd", "ce", "teacher_ce", "eval_loss", "eval_kd"} <= anchor.losses.keys()
    assert anchor.tokens_seen > 3 * 4 * 5
    assert anchor.training["source"] == "" and len(anchor.training["weights_sha256"]) == 64
    told = anchor.training["bridge"]
    assert told["source_tokenizer_sha256"] == tokenizer_hash(teachers_tokenizer())
    assert told["student"] == "" and len(told["student_weights_sha256"]) == 64
    assert told["arguments"] == training_record(bridge_config())
    assert told["arguments"]["values"]["objective"] == '{"alm": 1.0}' and told["arguments"]["values"]["max_steps"] == 3
    assert anchor.tokenizer_sha256 == lower.tokenizer_sha256 == tokenizer_hash(students_tokenizer())
    assert anchor.tokenizer_sha256 != told["source_tokenizer_sha256"]
    assert "bridge" not in lower.training and "eval_kd" in lower.losses


def test_each_anchor_is_calibrated_on_its_own_text_in_its_tokens(chain: Chain) -> None:
    for anchor, text in zip(chain.anchors, (rows(seed=5), rows()), strict=True):
        expected = token_blocks(text, students_tokenizer(), 256, 128).input_ids.numel()
        assert StoredStatistics(anchor.statistics_file).tokens == expected
    assert not list(chain.path.glob(".work*"))


def test_run_again_it_does_nothing(copied: Path, no_training: None) -> None:
    files = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    # The same objective in other words.
    build_bridged(copied, bridge=bridge_step(args=bridge_config(objective={"alm": 1})))
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()} == files


class _Stop(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def interrupt(folder: Path, after: int, **options: Any) -> None:
    """A build that ends in the bridge after so many steps, as a killed process would."""

    def trainer(*args: Any, **kwargs: Any) -> BridgeDistillTrainer:
        made = BridgeDistillTrainer(*args, **kwargs)
        made.add_callback(_Stop(after))
        return made

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bridge_module, "BridgeDistillTrainer", trainer)
        build_bridged(folder, **options)


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of bridges from here on."""
    steps: list[int] = []

    class Trainer(BridgeDistillTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            steps.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(bridge_module, "BridgeDistillTrainer", Trainer)
    return steps


def test_an_interrupted_bridge_goes_on(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path / "chain", after=2)
    assert not (tmp_path / "chain" / "chain.json").exists()
    steps = steps_taken(monkeypatch)
    resumed = build_bridged(tmp_path / "chain")
    assert steps == [2]
    for ours, theirs in zip(resumed.anchors, chain.anchors, strict=True):
        assert same_weights(ours.load_state_dict(), theirs.load_state_dict())
        assert (ours.tokens_seen, ours.losses, ours.training) == (theirs.tokens_seen, theirs.losses, theirs.training)


def test_checkpoints_of_other_settings_are_not_gone_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    interrupt(folder, after=2, bridge=bridge_step(args=bridge_config(objective="uld")))
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    asked = r"unfinished training .*checkpoint-2.*changed: \['bridge.objective'\].*or delete .*\.work"
    with pytest.raises(ValueError, match=asked):
        build_bridged(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": source(seed=4)}, r"a chain of another source .*'weights_sha256'"),
        ({"processing_class": make_tokenizer("byte_level", 410, seed=1)}, r"changed: \['source_tokenizer_sha256'\]"),
        ({"bridge": bridge_step(model=anchor_zero(seed=4))}, r"anchor .* changed: \['student_weights_sha256'\]"),
        (
            {"bridge": bridge_step(model=tiny_model("gpt2", vocab_size=300, n_positions=128, n_layer=5))},
            r"requested now: \{.*'n_layer': 5.*changed: \['student_weights_sha256'\]",
        ),
        (
            {"bridge": bridge_step(processing_class=make_tokenizer("byte_level", 290))},
            r"made with other settings .*changed: \['tokenizer'\]",
        ),
        (
            {"bridge": bridge_step(args=bridge_config(objective="uld", learning_rate=1.0))},
            r"changed: \['learning_rate', 'objective'\]",
        ),
        ({"bridge": None, "anchors": [{"num_hidden_layers": 1}]}, r"changed: \['tokenizer', 'bridge'\]"),
        ({"args": chain_config(learning_rate=1.0)}, r"changed arguments: \['learning_rate'\]"),
    ],
)
def test_what_does_not_go_with_the_chain_there_is_refused(
    copied: Path, no_training: None, changes: dict[str, Any], message: str
) -> None:
    before = (copied / "chain.json").read_text()
    with pytest.raises(ValueError, match=rf"already holds .*{message}.*Choose another output_dir, or delete"):
        build_bridged(copied, **changes)
    assert (copied / "chain.json").read_text() == before


def test_the_callers_models_are_left_as_they_were(tmp_path: Path) -> None:
    teacher, student = source().train(), anchor_zero()
    interrupt(tmp_path / "chain", after=1, source=teacher, bridge=bridge_step(model=student))
    for ours, fresh in ((teacher, source()), (student, anchor_zero())):
        assert same_weights(dict(ours.state_dict()), dict(fresh.state_dict()))
        assert ours.config.to_dict() == fresh.config.to_dict()
        assert all(parameter.requires_grad for parameter in ours.parameters())
    assert teacher.training and not student.training


def test_both_sides_as_they_are_saved(tmp_path: Path) -> None:
    """Tokenizers are found beside the models, and the source may be of a family that no chain is built from."""
    teacher = BloomForCausalLM(BloomConfig(vocab_size=420, hidden_size=16, n_layer=1, n_head=2))
    for name, model, tokenizer in (
        ("source", teacher, teachers_tokenizer()),
        ("zero", anchor_zero(), students_tokenizer()),
        ("other", anchor_zero(seed=4), students_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    args = bridge_config(max_steps=1, save_strategy="no")
    options = {"source": tmp_path / "source", "processing_class": None, "args": chain_config(max_steps=1)}
    chain = build_bridged(tmp_path / "chain", bridge=BridgeStep(str(tmp_path / "zero"), args=args), **options)
    told = chain.source.training
    assert told["source"].startswith("source@") and told["weights_sha256"] is None
    assert told["bridge"]["student"].startswith("zero@") and told["bridge"]["student_weights_sha256"] is None
    assert told["bridge"]["source_tokenizer_sha256"] == tokenizer_hash(teachers_tokenizer())
    assert chain.tokenizer().get_vocab() == students_tokenizer().get_vocab()
    # Without text of its own, the chain's.
    tokens = token_blocks(rows(), students_tokenizer(), 256, 128).input_ids.numel()
    assert StoredStatistics(chain.source.statistics_file).tokens == tokens
    with pytest.raises(ValueError, match=r"already holds the anchor .*changed: \['student'\]"):
        build_bridged(tmp_path / "chain", bridge=BridgeStep(str(tmp_path / "other"), args=args), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bridge": anchor_zero()},
            r"bridge is a GPT2LMHeadModel, but must be a BridgeStep.*bridge=BridgeStep\(model",
        ),
        ({"bridge": bridge_step(args=chain_config())}, r"args of the bridge are a DistillConfig: a BridgeDistillC"),
        (
            {"bridge": bridge_step(args=SFTConfig("x", use_cpu=True, bf16=False))},
            r"args of the bridge are a SFTConfig",
        ),
        (
            {"bridge": bridge_step(args=bridge_config(teacher_model_name_or_path="x"))},
            r"of the bridge set teacher_model_name_or_path, but the teacher of its model is the source.*`source`",
        ),
        ({"args": bridge_config()}, r"args of an anchor are a BridgeDistillConfig, but must be a DistillConfig"),
        (
            {"bridge": bridge_step(model=BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2)))},
            r"Model type 'bloom' has no description.*Supported model types: .*gemma2",
        ),
        ({"bridge": bridge_step(model="no/such-model-anywhere")}, r"The model of the bridge 'no/such-model-anywhere'"),
        ({"bridge": bridge_step(processing_class=None)}, r"No tokenizer could be loaded from the model of the bridge"),
        ({"processing_class": None}, r"No tokenizer could be loaded from the source .*Pass `processing_class`"),
        (
            {"bridge": bridge_step(processing_class=make_tokenizer("byte_level", 350))},
            r"The model of the bridge has 300 vocabulary rows, and the tokenizer given for it, .* has 350 tokens",
        ),
        (
            {"processing_class": make_tokenizer("byte_level", 450)},
            r"The source has 420 vocabulary rows, and the tokenizer .* as `processing_class`, or resize",
        ),
        (
            {"processing_class": students_tokenizer()},
            r"have one tokenizer \(300 tokens\), so there is nothing to bridge. Leave `bridge` out: plain anchors",
        ),
        (
            {"bridge": bridge_step(dataset=Dataset.from_dict({"story": ["w"]}))},
            r"columns \['story'\], and none of the",
        ),
        ({"dataset": Dataset.from_dict({"story": ["w"]})}, r"columns \['story'\], and none of the SFT formats"),
        ({"anchors": [{"n_layer": 5}]}, r"n_layer=5 is larger than the 4"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    tmp_path: Path, no_training: None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build_bridged(tmp_path / "chain", **changes)
    assert not (tmp_path / "chain").exists()
