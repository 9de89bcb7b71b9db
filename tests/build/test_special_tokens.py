"""Anchors and targets end, pad and render texts as they were taught to: as a `DistillTrainer` alone saves them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_trl import Chain, DistillTrainer, build_chain, chain_from_anchors, from_chain
from tests.build.bridged import bridge_config, bridge_step, build_bridged
from tests.chain.helpers import chain_config, chain_rows, chain_source
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

# TRL's, which still does what it did.
pytestmark = pytest.mark.filterwarnings("ignore:.pad_token. is deprecated:FutureWarning")
ANCHORS = [{"num_hidden_layers": 4}, {"num_hidden_layers": 3}]
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' w9 ' }}{% endfor %}"
ROLES = ("eos_token_id", "bos_token_id", "pad_token_id")


def saved(folder: Path, *roles: str) -> dict[str, Any]:
    """What a model's folder says of the tokens that begin, end and pad."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    configs = {"config": model.config, "generation_config": model.generation_config}
    found: dict[str, Any] = {
        f"{where}.{role}": getattr(config, role) for where, config in configs.items() for role in roles or ROLES
    }
    return {**found, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token, "template": tokenizer.chat_template}


def one_step(**fields: Any) -> Any:
    return chain_config(**{"max_steps": 1, "save_strategy": "no", **fields})


def ending(model: Any, config_ends: Any, generation_ends: Any) -> Any:
    model.config.eos_token_id, model.generation_config.eos_token_id = config_ends, generation_ends
    return model


def without_pad() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def other_tokenizer(folder: Path, words: list[str] | None = None) -> str:
    tokenizer = tiny_tokenizer(words)
    tokenizer.eos_token, tokenizer.chat_template = "<assistant>", TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("fields", "ends", "tokenizer", "trained"),
    [
        ({}, (2, 2), tiny_tokenizer, 1),
        ({"eos_token": "w7"}, (2, 2), tiny_tokenizer, 1),
        ({"eos_token": "w7"}, (2, [2, 5]), tiny_tokenizer, 2),
        ({"eos_token": "w7"}, ([2, 5], None), tiny_tokenizer, 1),
        ({"eos_token": "w7", "pad_token": "w8"}, (None, None), tiny_tokenizer, 2),
        # The tokenizer already ends texts otherwise than the source's configs.
        ({}, (5, [5, 4]), tiny_tokenizer, 1),
        ({}, ([5, 4], [4]), tiny_tokenizer, 1),
        ({"eos_token": "w7"}, (2, 2), without_pad, 1),
        ({"chat_template_path": "chat.jinja"}, (2, 2), tiny_tokenizer, 1),
    ],
)
def test_every_anchor_and_target_is_as_the_trainer_saves_it(
    fields: dict[str, Any], ends: tuple[Any, Any], tokenizer: Any, trained: int, tmp_path: Path
) -> None:
    if "chat_template_path" in fields:
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        fields = {"chat_template_path": str(tmp_path / "chat.jinja")}
    own, source = tokenizer(), ending(chain_source(), *ends)
    before = own.eos_token, own.pad_token, own.chat_template
    chain = build_chain(
        source,
        ANCHORS[:trained],
        dataset=chain_rows(),
        output_dir=tmp_path / "chain",
        args=one_step(**fields),
        processing_class=own,
        calibration_tokens=64,
    )
    assert (own.eos_token, own.pad_token, own.chat_template) == before
    assert (source.config.eos_token_id, source.generation_config.eos_token_id) == ends
    alone = DistillTrainer(
        ending(tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=2), *ends),
        teacher_model=chain_source(),
        args=one_step(**fields, output_dir=str(tmp_path / "run")),
        train_dataset=chain_rows(),
        processing_class=tokenizer(),
    )
    alone.train()
    alone.save_model(str(tmp_path / "alone"))
    for anchor in chain.anchors[1:]:
        assert saved(anchor.path) == saved(tmp_path / "alone")
    # What pads is of a training, and the first anchor had none.
    begin_and_end = ROLES[:2]
    assert saved(chain.source.path, *begin_and_end) == saved(tmp_path / "alone", *begin_and_end)
    from_chain(chain, config={"num_hidden_layers": 5}, save_directory=tmp_path / "target")
    assert saved(tmp_path / "target", *begin_and_end) == saved(tmp_path / "alone", *begin_and_end)
    assert from_chain(chain, config={"num_hidden_layers": 5}).generation_config.do_sample


def test_the_template_of_another_tokenizer_is_taken_over_where_it_brings_no_tokens(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": chain_rows(), "processing_class": tiny_tokenizer(), "calibration_tokens": 64}
    args = one_step(chat_template_path=other_tokenizer(tmp_path / "other"))
    chain = build_chain(chain_source(), ANCHORS[:1], output_dir=tmp_path / "chain", args=args, **options)
    for anchor in chain.anchors:
        found = saved(anchor.path)
        assert (found["template"], found["eos"], found["config.eos_token_id"]) == (TEMPLATE, "<assistant>", 5)
        assert 5 in found["generation_config.eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"chat_template_path=.*brings 1 tokens .*'<tool>'.*clone_chat_template"):
        build_chain(chain_source(), ANCHORS[:1], output_dir=tmp_path / "new", args=args, **options)
    assert not (tmp_path / "new").exists()


def test_a_bridge_ends_as_its_chain(tmp_path: Path) -> None:
    # The student's tokenizer; the source's own end is its own affair.
    args = {"max_steps": 1, "save_strategy": "no"}
    step = bridge_step(args=bridge_config(**args, eos_token="a"))
    chain = build_bridged(tmp_path / "chain", bridge=step, args=chain_config(**args))
    end = chain.tokenizer().convert_tokens_to_ids("a")
    for anchor in chain.anchors:
        found = saved(anchor.path)
        assert (found["eos"], found["config.eos_token_id"]) == ("a", end)
        assert found["generation_config.eos_token_id"][0] == end


@pytest.mark.parametrize("saved_before", [False, True])
def test_anchors_that_were_trained_apart_end_as_the_tokenizer_and_each_of_them(
    saved_before: bool, tmp_path: Path
) -> None:
    models = [
        ending(tiny_model("llama", num_hidden_layers=4), 5, 5),
        ending(tiny_model("llama", num_hidden_layers=2), 5, [5, 4]),
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "w7"
    for model in models if saved_before else []:
        model.save_pretrained(tmp_path / str(model.config.num_hidden_layers))
    chain = chain_from_anchors(
        [tmp_path / "4", tmp_path / "2"] if saved_before else models,
        dataset=chain_rows(),
        output_dir=tmp_path / "chain",
        processing_class=tokenizer,
        calibration_tokens=64,
    )
    for anchor in chain.anchors:
        found = saved(anchor.path)
        assert (found["config.eos_token_id"], found["generation_config.eos_token_id"]) == (13, [13, 5, 4])
    assert [model.generation_config.eos_token_id for model in models] == [5, [5, 4]]


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_two_ends_in_one_chain_are_refused(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "dataset": chain_rows(),
        "processing_class": tiny_tokenizer(),
        "output_dir": tmp_path / "c",
    }
    anchors = [ANCHORS[0], {**ANCHORS[1], "args": one_step(**{name: "w8"})}]
    with pytest.raises(ValueError, match=rf"{name}='w7' and {name}='w8'. A chain has one tokenizer"):
        build_chain(chain_source(), anchors, args=one_step(**{name: "w7"}), **options)
    with pytest.raises(ValueError, match=rf"{name}='<end>' is not in the vocabulary .*60 tokens"):
        build_chain(chain_source(), ANCHORS, args=one_step(**{name: "<end>"}), **options)
    assert not (tmp_path / "c").exists()


def test_what_one_anchor_is_taught_holds_for_all_and_is_not_changed_later(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": chain_rows(), "processing_class": tiny_tokenizer(), "calibration_tokens": 64}
    options |= {"args": one_step(), "output_dir": tmp_path / "chain"}
    own = {**ANCHORS[1], "args": one_step(eos_token="w7")}
    chain = build_chain(chain_source(), [ANCHORS[0], own], **options)
    assert [saved(anchor.path)["eos"] for anchor in chain.anchors] == ["w7"] * 3
    # The first anchor alone is finished: nothing was trained that could tell.
    manifest = json.loads((chain.path / "chain.json").read_text())
    assert manifest["anchors"][0]["training"]["source_options"]["eos_token"] == "w7"
    own["args"] = one_step(eos_token="w8")
    with pytest.raises(ValueError, match=r"the anchor 49K .*changed: \['eos_token'\]"):
        build_chain(chain_source(), [ANCHORS[0], own], **options)
    assert len(Chain.from_pretrained(chain.path).anchors) == 3
