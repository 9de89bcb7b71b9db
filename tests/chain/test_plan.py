"""The arguments of a chain's anchors: what is recorded, what is refused, what an older record means."""

from types import SimpleNamespace

import pytest
from trl import SFTConfig

from cbd_trl import BridgeDistillConfig, DistillConfig
from cbd_trl.architectures import describe
from cbd_trl.chain import finished, plan
from cbd_trl.chain.arguments import training_record
from cbd_trl.chain.finished import finished_anchors
from cbd_trl.chain.head import Head
from cbd_trl.chain.plan import plan_chain
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge_config

# Where the teacher comes from (refused in a chain), and how memory is used: neither decides what is trained.
NOT_RECORDED = {
    *("teacher_model_name_or_path", "teacher_model_init_kwargs", "teacher_model_revision", "teacher_weights"),
    *("teacher_cache", "self_distillation", "teacher_offload", "loss_chunk_size"),
}


@pytest.fixture(scope="module")
def source():
    return describe(chain_source().config)


def planned(source, **overrides):
    return plan_chain(source, CHAIN_ANCHORS, chain_config(**overrides), chain_rows())


def test_every_own_field_is_recorded_or_named_as_one_that_is_not(source):
    own = set(DistillConfig.__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)
    recorded = training_record(planned(source)[0].args).keys()
    assert own - recorded == NOT_RECORDED


def test_so_is_every_field_of_a_bridge():
    own = set(BridgeDistillConfig.__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)
    assert own - training_record(make_bridge_config()).keys() == NOT_RECORDED


@pytest.fixture
def older(source, tmp_path, monkeypatch):
    """A chain of a version that had fewer arguments, finished with the defaults of today."""
    recent = ("kd_schedule", "kd_weight_end", "skew", "head_share", "top_k", "hidden_projector")
    records = [{**training_record(step.args), "fingerprint": "older"} for step in planned(source)]
    for name in recent:
        for record in records:
            del record[name]
    steps = planned(source)
    anchors = [SimpleNamespace(name="source", shape=source.shape, training={}, tokenizer=None)]
    anchors += [
        SimpleNamespace(name=step.name, shape=step.architecture.shape, training=record)
        for step, record in zip(steps, records, strict=True)
    ]
    (tmp_path / finished.MANIFEST).write_text("{}")
    monkeypatch.setattr(finished.Chain, "from_pretrained", lambda folder: SimpleNamespace(anchors=anchors))
    return tmp_path


def test_an_argument_that_an_older_chain_did_not_have_was_at_its_default(source, older):
    head = Head(source, tiny_tokenizer(), chain_config(), chain_rows(), {}, [], "", lambda label: None)
    assert len(finished_anchors(older, head, planned(source))) == 3
    with pytest.raises(ValueError, match=r"changed arguments: \['top_k', 'hidden_loss'\]"):
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


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"teacher_cache": "cache"}, "teacher_cache"),
        ({"self_distillation": True}, "self_distillation"),
        ({"teacher_model_name_or_path": "x"}, "teacher_model_name_or_path"),
        ({"teacher_model_init_kwargs": {"dtype": "float32"}}, "teacher_model_init_kwargs"),
        ({"teacher_model_revision": "main"}, "teacher_model_revision"),
        ({"teacher_weights": [1.0]}, "teacher_weights"),
    ],
)
def test_a_teacher_of_its_own_is_refused(source, fields, named):
    with pytest.raises(ValueError, match=rf"args of a chain set {named}, but .* is the anchor above it.*as `source`"):
        planned(source, **fields)


def test_defaults_are_checked_beside_what_was_asked_for(source, monkeypatch):
    monkeypatch.setattr(plan, "SWAP_PROBABILITY", 1.5)
    with pytest.raises(ValueError, match=r"swap_probability=1\.5: it is the share of steps"):
        planned(source)
