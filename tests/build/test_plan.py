"""The arguments of a chain's anchors: what is recorded, what is refused, what an older record means."""

from types import SimpleNamespace

import pytest

from cbd_trl import build_chain
from cbd_trl.architectures import describe
from cbd_trl.build import plan
from cbd_trl.build import resume as finished
from cbd_trl.build.arguments import training_record
from cbd_trl.build.plan import plan_chain
from cbd_trl.build.resume import finished_anchors
from cbd_trl.build.source_anchor import SourceAnchor
from cbd_trl.build.special_tokens import SpecialTokens
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source
from tests.tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def source():
    return describe(chain_source().config)


def planned(source, **overrides):
    return plan_chain(source, CHAIN_ANCHORS, chain_config(**overrides), chain_rows())


@pytest.fixture
def older(source, tmp_path, monkeypatch):
    """A chain of a version that had fewer arguments, finished with the defaults of today."""
    older = ("learning_rate", "divergence", "hidden_loss", "max_steps")
    records = [training_record(step.args) for step in planned(source)]
    records = [{"arguments": {"values": {name: record["values"][name] for name in older}}} for record in records]
    steps = planned(source)
    anchors = [SimpleNamespace(name="source", shape=source.shape, training={}, tokenizer_sha256=None)]
    anchors += [
        SimpleNamespace(name=step.name, shape=step.architecture.shape, training=record)
        for step, record in zip(steps, records, strict=True)
    ]
    (tmp_path / finished.MANIFEST).write_text("{}")
    monkeypatch.setattr(finished.Chain, "from_pretrained", lambda folder: SimpleNamespace(anchors=anchors))
    return tmp_path


def test_an_argument_that_an_older_chain_does_not_record_is_not_compared(source, older):
    texts = tiny_tokenizer(), SpecialTokens()
    head = SourceAnchor(source, *texts, chain_config(), chain_rows(), {}, [], "", lambda label: None)
    assert len(finished_anchors(older, head, planned(source))) == 3
    with pytest.raises(ValueError, match=r"changed arguments: \['hidden_loss'\]"):
        finished_anchors(older, head, planned(source, top_k=8, hidden_loss="cosine", hidden_weight=2.0))


def test_a_projector_goes_without_hybrids(source):
    steps = planned(source, hidden_projector=True, hidden_weight=1.0)
    assert [step.args.swap_probability for step in steps] == [0.0, 0.0]


@pytest.mark.parametrize("launcher", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_hybrids_are_refused_where_models_are_sharded_before_any_work(source, monkeypatch, launcher):
    args = chain_config()
    monkeypatch.setenv(launcher, "true")
    with pytest.raises(ValueError, match=r"swap_probability=0\.5 runs .* Set swap_probability=0, or train with DDP"):
        plan_chain(source, [{"num_hidden_layers": 4}], args, chain_rows())
    args.swap_probability = 0.0
    assert plan_chain(source, [{"num_hidden_layers": 4}], args, chain_rows())[0].args.swap_probability == 0.0


def test_hybrids_are_refused_where_no_shape_lies_between(source):
    with pytest.raises(ValueError, match=r"swap_probability=0\.5 trains models between .* set it to 0 in the `args`"):
        plan_chain(source, [{"intermediate_size": 47}], chain_config(swap_probability=0.5), chain_rows())


def test_arguments_that_go_wrong_in_a_build_are_refused(source):
    with pytest.raises(
        ValueError, match=r"args of a chain set teacher_cache, but .* is the anchor above it.*as `source`"
    ):
        planned(source, teacher_cache="cache")
    with pytest.raises(ValueError, match=r"args of a chain set push_to_hub=True: .*`cbd-trl push FOLDER"):
        planned(source, push_to_hub=True)
    own = [CHAIN_ANCHORS[0], {**CHAIN_ANCHORS[1], "args": chain_config(save_only_model=True)}]
    with pytest.raises(ValueError, match=r"args of a chain set save_only_model=True: "):
        plan_chain(source, own, chain_config(), chain_rows())


def test_defaults_are_checked_beside_what_was_asked_for(source, monkeypatch):
    monkeypatch.setattr(plan, "SWAP_PROBABILITY", 1.5)
    with pytest.raises(ValueError, match=r"swap_probability=1\.5: it is the share of steps"):
        planned(source)


@pytest.mark.parametrize("anchors", [170e3, 0.6, {"num_hidden_layers": 4}, "85M"])
def test_a_single_anchor_is_to_stand_in_a_list(anchors, tmp_path):
    with pytest.raises(TypeError, match=r"anchors is .* must be a list") as error:
        build_chain("nowhere", anchors, dataset=None, output_dir=tmp_path)
    assert f"anchors=[{anchors!r}]" in str(error.value)
