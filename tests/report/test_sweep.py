"""The sweep: what is built, what is measured once, what is measured anew."""

import json
from types import SimpleNamespace

import pytest
import torch

from cbd_trl.architectures import describe
from cbd_trl.report.sweep import SweepTarget, fingerprint, random_model, sweep
from cbd_trl.utils.files import Results, write_text
from tests.tiny import tiny_model


class Builds:
    """Stands in for from_chain: makes random models and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, chain, num_parameters=None, *, config=None, operator="nested"):
        self.asked.append((num_parameters, config, operator))
        depth = (config or {}).get("num_hidden_layers", 3)
        return tiny_model("llama", num_hidden_layers=depth, seed=len(operator))


@pytest.fixture
def chain():
    def anchor(name, depth):
        model = tiny_model("llama", num_hidden_layers=depth)
        return SimpleNamespace(
            name=name,
            files={"model": name},
            load_model=lambda: tiny_model("llama", num_hidden_layers=depth),
            architecture=lambda: describe(model.config),
        )

    return SimpleNamespace(anchors=[anchor("large", 4), anchor("small", 2)])


TARGETS = [SweepTarget(num_parameters=5e4), SweepTarget(config={"num_hidden_layers": 2})]


def loss_of(model):
    return float(sum(p.detach().sum() for p in model.parameters()))


def test_every_operator_is_built_in_the_shape_of_the_first(chain):
    builds = Builds()
    steps = []
    report = sweep(
        chain, TARGETS, ["nested", "expand"], loss_of, build=builds, on_step=lambda *args: steps.append(args)
    )
    shape = describe(tiny_model("llama", num_hidden_layers=3).config).shape
    assert builds.asked[0] == (5e4, {}, "nested")
    assert builds.asked[1] == (None, shape, "expand")
    assert [anchor["name"] for anchor in report["anchors"]] == ["large", "small"]
    first, second = report["targets"]
    assert first["shape"] == shape and second["shape"]["num_hidden_layers"] == 2
    assert list(first["loss"]) == ["nested", "expand", "random"]
    assert first["num_parameters"] == tiny_model("llama", num_hidden_layers=3).num_parameters()
    assert first["loss"]["nested"] == pytest.approx(loss_of(tiny_model("llama", num_hidden_layers=3, seed=6)))
    assert first["seconds"] == first["seconds_by_operator"]["nested"] >= 0
    assert steps[0] == ("large", 0, 8) and steps[2][0] == "50k, nested"
    json.dumps(report)


def test_what_is_known_is_not_measured_again(chain, tmp_path):
    measured = []

    def evaluate(model):
        measured.append(model)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return loss_of(model)

    options = {"results": tmp_path / "results.json", "build": Builds(), "key": "text"}
    with pytest.raises(KeyboardInterrupt):
        sweep(chain, TARGETS, ["nested"], evaluate, **options)
    report = sweep(chain, TARGETS, ["nested"], evaluate, **options)
    assert len(measured) == 4 + 3  # six models, three of them before the interruption
    assert sweep(chain, TARGETS, ["nested"], evaluate, **options) == report
    assert len(measured) == 7
    # Another text, another seed of the random models, another chain: measured anew.
    sweep(chain, TARGETS, ["nested"], evaluate, **{**options, "key": "other text"})
    assert len(measured) == 13
    sweep(chain, TARGETS, ["nested"], evaluate, **options, seed=1)
    assert len(measured) == 15
    chain.anchors[0].files["model"] = "retrained"
    sweep(chain, TARGETS, ["nested"], evaluate, **options)
    assert len(measured) == 21


def test_random_model_depends_on_the_seed_alone():
    like = tiny_model("llama")
    state = torch.get_rng_state()
    first, same, other = random_model(like, 0), random_model(like, 0), random_model(like, 1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.get_input_embeddings().weight for model in (first, same, other, like)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    assert describe(first.config).shape == describe(like.config).shape and not first.training


def test_errors(chain):
    with pytest.raises(ValueError, match=r"neither a size nor a shape.*num_parameters=60e6"):
        SweepTarget()
    with pytest.raises(ValueError, match="needs at least one operator"):
        sweep(chain, TARGETS, [], loss_of)
    with pytest.raises(ValueError, match="a function that measures a model"):
        sweep(chain, TARGETS)


def test_fingerprint_tells_parts_apart():
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(torch.tensor([1])) != fingerprint(torch.tensor([2]))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_results_survive_and_damage_is_named(tmp_path):
    path = tmp_path / "folder" / "results.json"
    Results(path).put("key", {"loss": 1.5})
    assert Results(path).get("key") == {"loss": 1.5}
    assert Results(path).get("other") is None
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    write_text(path, "{")
    with pytest.raises(ValueError, match=r"results\.json is not JSON.*delete it"):
        Results(path)
    write_text(path, "[]")
    with pytest.raises(ValueError, match=r"results\.json holds a list"):
        Results(path)
