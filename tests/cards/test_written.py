"""The cards that building, from_chain, training and pushing leave behind: valid, true, and usable as they say."""

import re

import pytest
from huggingface_hub import HfApi
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from cbd_trl import Chain, from_chain
from cbd_trl.cards.origin import Origin
from cbd_trl.chain.cards import save_cards
from cbd_trl.chain.manifest import read_manifest, write_manifest
from cbd_trl.utils.formatting import markdown_table
from tests.cards.helpers import HUB_ROWS, SOURCE, as_html, metadata, read, use
from tests.chain.helpers import DEEP, WIDE
from tests.tokenizer import tiny_tokenizer
from tests.training import make_trainer

# How the Hub's client sends a file is on its way out in its HTTP library; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

FROM_SOURCE = {"base_model": [SOURCE], "base_model_relation": "finetune", "license": "apache-2.0"}
CARRIED = f"`apache-2.0`: carried over from `{SOURCE}`."


def assert_from_source(data):
    assert {key: data.get(key) for key in FROM_SOURCE} == FROM_SOURCE


def test_the_card_of_a_chain(chain, monkeypatch):
    text = read(chain.path)
    assert metadata(text) == {
        **FROM_SOURCE, "library_name": "cbd_trl", "pipeline_tag": "text-generation", "model_name": "tiny-chain",
        "datasets": [HUB_ROWS], "tags": ["cbd_trl", "distillation", "chain", "trl"],
    }  # fmt: skip
    assert CARRIED in text and str(chain.path.parent) not in text and "loss-against-size" not in text
    for anchor in chain.anchors:
        assert f"| {anchor.name} | {anchor.num_parameters:,} |" in text
        assert anchor.files["model.safetensors"][:16] in text
    made = use(text, chain.path.parent, monkeypatch)
    size = int(re.search(r"num_parameters=([\d_]+)\)", text)[1])
    assert made["model"].num_parameters() == pytest.approx(size, rel=0.03)
    assert made["tokenizer"].get_vocab() == tiny_tokenizer().get_vocab()


def test_the_cards_of_anchors(chain, monkeypatch):
    for anchor in chain.anchors:
        text = read(anchor.path)
        data = metadata(text)
        assert_from_source(data)
        assert (data["library_name"], data["model_name"]) == ("transformers", anchor.name)
        trained = anchor.parent is not None
        assert trained == (anchor.tokens_seen > 0) == ("datasets" in data) == ("trl" in data["tags"])
        assert CARRIED in text and str(chain.path.parent) not in text
        made = use(text, chain.path.parent, monkeypatch)
        assert made["model"].num_parameters() == anchor.num_parameters
    assert f"cut from {chain.anchors[1].name}, refitted and distilled from it" in text
    assert "| cross-entropy (nats) | " in text and "| `learning_rate` | `0.01` |" in text


@pytest.fixture
def adopting(chain, tmp_path):
    """A copy of the chain whose second anchor was taught by a public model, and whose third was one."""
    chain.save_pretrained(tmp_path / "copy")
    manifest = read_manifest(tmp_path / "copy")
    records = [
        {"model": "org/small", "revision": "0" * 40, "obstacle": "anchors[0] (org/small) differs."},
        {"model": "tiny@0123456789abcdef", "revision": None, "obstacle": None},
    ]
    origins = [
        Origin("org/small", ("org/small",), license="gemma"),
        Origin("tiny", ("org/tiny",), license="apache-2.0"),
    ]
    anchors = list(manifest.anchors)
    for number, (record, origin) in enumerate(zip(records, origins, strict=True), start=1):
        training = {**anchors[number].training, "public_model": record, "origins": [origin.record()]}
        training |= {"match": {"width": {"matched": 0.7, "random": 0.1}}} if number == 2 else {}
        anchors[number] = anchors[number].model_copy(update={"training": training})
    write_manifest(tmp_path / "copy", manifest.model_copy(update={"anchors": anchors}))
    return Chain.from_pretrained(tmp_path / "copy")


def test_models_that_exist_already_are_on_the_cards(adopting, tmp_path):
    """The base models are all that weights or lessons came from, the license is one only where they share one."""
    first, second, third = adopting.anchors
    save_cards(adopting)
    from_chain(adopting, config=WIDE, save_directory=tmp_path / "target")
    both = {"license": "other", "license_name": "apache-2.0-and-gemma"}
    assert_from_source(metadata(read(first.path)))
    bases = {second.path: [SOURCE, "org/small"]}
    for folder in (third.path, adopting.path, tmp_path / "target"):
        bases[folder] = [SOURCE, "org/small", "org/tiny"]
    for folder, models in bases.items():
        text = read(folder)
        data = metadata(text)
        assert data["base_model"] == models and {key: data[key] for key in both} == both
        assert f"`apache-2.0` (`{SOURCE}`), `gemma` (`org/small`)" in text
        assert "`other` is stated above, because they are not the same. Look all of them up" in text
    assert f"cut from {first.name}, refitted, taught by it and by `org/small`" in read(second.path)
    text = read(third.path)
    assert f"`tiny`, put into the coordinates of {second.name} and distilled from it" in text
    assert (
        "| `match of width` | `{'matched': 0.7, 'random': 0.1}` |" in text and "| `learning_rate` | `0.01` |" in text
    )


@pytest.mark.parametrize("operator", ["nested", "slice"])
def test_the_card_of_a_target(chain, tmp_path, monkeypatch, operator):
    model = from_chain(chain, config=WIDE, operator=operator, save_directory=tmp_path / "wide-one")
    text = read(tmp_path / "wide-one")
    assert metadata(text) == {
        **FROM_SOURCE, "library_name": "transformers", "pipeline_tag": "text-generation", "model_name": "wide-one",
        "tags": ["cbd_trl", "distillation", "from_chain"],
    }  # fmt: skip
    assert CARRIED in text and f"| operator | `{operator}` |" in text and str(tmp_path) not in text
    for anchor in chain.anchors[1:]:
        assert anchor.files["model.safetensors"] in text
    made = use(text, tmp_path, monkeypatch)
    assert made["generator"].model.num_parameters() == model.num_parameters()


def test_the_card_of_a_trained_model(chain, tmp_path, monkeypatch):
    """A student from a folder: the models on the Hub that its card names, their license, and never the folder."""
    student = from_chain(chain, config=DEEP, save_directory=tmp_path / "deep")
    trainer = make_trainer(student=student, output_dir=str(tmp_path / "trained"), eval_dataset=None)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name=HUB_ROWS, tags=["mine"])
    text = read(tmp_path / "trained")
    assert metadata(text) == {
        **FROM_SOURCE, "library_name": "transformers", "pipeline_tag": "text-generation", "model_name": "trained",
        "datasets": [HUB_ROWS],
        "tags": ["cbd_trl", "distillation", "generated_from_trainer", "trl", "distill", "mine"],
    }  # fmt: skip
    assert "`apache-2.0`: carried over from `deep`." in text and str(tmp_path) not in text
    assert "| per token | training, step 1 |" in text
    assert use(text, tmp_path, monkeypatch)["generator"].model.num_parameters() == student.num_parameters()


def test_a_student_from_the_hub_is_its_base_model(hub, tmp_path, monkeypatch):
    """At whatever branch; and it is looked up once."""
    hub.commit(SOURCE, tmp_path, "empty")
    hub.repositories[SOURCE].references["v1"] = hub.head(SOURCE)
    hub.repositories[SOURCE].references["main"] = hub.head(SOURCE, "empty")
    student = AutoModelForCausalLM.from_pretrained(SOURCE, revision="v1")
    trainer = make_trainer(student=student, output_dir=str(tmp_path / "trained"))
    trainer.create_model_card()
    assert_from_source(metadata(read(tmp_path / "trained")))
    asked = [path for _, path in hub.requests if path.endswith("README.md")]
    trainer.create_model_card()
    assert asked and [path for _, path in hub.requests if path.endswith("README.md")] == asked


def test_an_adapter_says_that_it_is_one(chain, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(chain.anchors[1].path)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2)
    trainer = make_trainer(student=student, peft_config=adapter, output_dir=str(tmp_path / "adapter"))
    trainer.create_model_card()
    data = metadata(read(tmp_path / "adapter"))
    assert (data["library_name"], data["base_model_relation"], data["base_model"]) == ("peft", "adapter", [SOURCE])
    assert data["license"] == "apache-2.0"


def test_names_of_files_are_no_ids(tmp_path, monkeypatch):
    """Names in the form of an id, of what is a folder here, was one once, or is a file of rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    trainer = make_trainer(output_dir=str(tmp_path / "trained"))
    trainer._student_name = "runs/before"
    trainer.create_model_card(dataset_name="rows.jsonl")
    text = read(tmp_path / "trained")
    assert not {"base_model", "base_model_relation", "datasets", "license"} & metadata(text).keys()
    assert "| data | `rows.jsonl` |" in text
    assert "None is stated: the source of this model is not known." in text


def test_an_edited_card_is_left_alone_by_training(tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "trained"))
    trainer.create_model_card()
    edited = read(tmp_path / "trained") + "My own words.\n"
    (tmp_path / "trained" / "README.md").write_text(edited)
    trainer.create_model_card()
    assert read(tmp_path / "trained") == edited


def test_cards_that_are_pushed_and_targets_of_what_was(hub, chain, tmp_path, monkeypatch):
    chain.push_to_hub("me/pushed")
    files = {name: content.decode() for name, content in hub.files("me/pushed").items() if name.endswith("README.md")}
    assert len(files) == 4
    for name, text in files.items():
        assert_from_source(metadata(text))
        assert str(chain.path.parent) not in text
        made = use(text, tmp_path, monkeypatch)
        anchor = name.partition("/")[0]
        assert anchor == "README.md" or made["model"].num_parameters() == chain[anchor].num_parameters
    assert metadata(files["README.md"])["model_name"] == "pushed"

    opened = Chain.from_pretrained("me/pushed")
    for operator, relation in (("nested", "merge"), ("slice", "finetune")):
        from_chain(opened, config=DEEP, operator=operator, save_directory=tmp_path / operator)
        text = read(tmp_path / operator)
        data = metadata(text)
        assert (data["base_model"], data["base_model_relation"]) == (["me/pushed", SOURCE], relation)
        assert f"| chain | `me/pushed` at commit `{opened.revision}` |" in text


def test_the_card_of_an_anchor_in_a_repository_of_its_own(hub, chain, tmp_path, monkeypatch):
    chain.push_to_hub("me/pushed", own_repos=True)
    anchor = chain.anchors[2]
    text = hub.files(f"me/pushed-{anchor.name}")["README.md"].decode()
    assert_from_source(metadata(text))
    made = use(text, tmp_path, monkeypatch)
    assert made["model"].num_parameters() == anchor.num_parameters
    assert made["model"].name_or_path == f"me/pushed-{anchor.name}"


def test_the_folder_of_a_target_is_sent_with_its_card(hub, chain, tmp_path):
    """And `push_to_hub`, which sends none, keeps it."""
    model = from_chain(chain, config=DEEP, save_directory=tmp_path / "deep")
    hub.create({"name": "deep"}, "me")
    HfApi().upload_folder(repo_id="me/deep", folder_path=tmp_path / "deep")
    for _ in range(2):
        assert_from_source(metadata(hub.files("me/deep")["README.md"].decode()))
        model.push_to_hub("me/deep")


def test_bars_and_line_breaks_stay_in_their_cell_of_a_table():
    table = markdown_table(["name", "value"], [["a|b", 1], ["c\nd", ""]], ["left", "right"])
    assert table == "| name | value |\n| :--- | ---: |\n| a\\|b | 1 |\n| c d |  |"
    assert as_html(f"\n---\n{table}").count("<td") == 4
