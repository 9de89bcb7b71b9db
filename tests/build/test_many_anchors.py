"""A chain of four anchors: every size has its pair, shapes grow with the size, and anchors join their two pairs."""

import itertools

import pytest
from transformers import PreTrainedModel

from cbd_trl import Chain, from_chain
from cbd_trl.chain.folders import write_anchor
from cbd_trl.chain.manifest import STATISTICS_FILE
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.surgery.blocks import blocks_of, spaced_layers
from cbd_trl.surgery.statistics_file import save_statistics
from cbd_trl.targets.operators import OPERATORS
from cbd_trl.targets.request import Request, find_target
from tests.surgery.helpers import described, logits, moments
from tests.tiny import randomize, tiny_model

# FFN widths that share no factor, so that the fine dial goes neuron by neuron.
_SHAPES = {
    "gpt2": [
        {"n_layer": 6, "n_inner": 301},
        {"n_layer": 4},
        {"n_embd": 16, "n_head": 2, "n_inner": 203},
        {"n_layer": 3, "n_embd": 8, "n_head": 1, "n_inner": 101},
    ],
    "llama": [
        {"num_hidden_layers": 6, "intermediate_size": 301},
        {"num_hidden_layers": 4},
        {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 203},
        {"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 101},
    ],
}


@pytest.fixture(scope="module", params=list(_SHAPES))
def chain(request, tmp_path_factory):
    """Four anchors with random weights: fewer layers, then narrower, then both. Nothing here is trained."""
    folder = tmp_path_factory.mktemp("four") / "chain"
    first, *others = _SHAPES[request.param]
    model: PreTrainedModel = tiny_model(request.param, tie_word_embeddings=True, **first)
    parent = None
    for number, fields in enumerate([{}, *others]):
        if parent is not None:
            above = described(model)[1]
            architecture = cut_architecture(above, fields)
            blocks = blocks_of(spaced_layers(above.depth, architecture.depth))
            model = type(model)(architecture.config).eval()
            randomize(model, seed=number)
        record = {"name": f"a{number}", "parent": parent, "blocks": None if parent is None else blocks}
        write_anchor(folder, record, _filler(model))
        parent = record["name"]
    return Chain.from_pretrained(folder)


def _filler(model):
    def fill(folder):
        model.save_pretrained(folder)
        architecture = described(model)[1]
        save_statistics([moments(model, architecture)], architecture, folder / STATISTICS_FILE)

    return fill


def sweep(chain, count):
    low, high = chain.anchors[-1].num_parameters, chain.anchors[0].num_parameters
    return [low + i * (high - low) / (count - 1) for i in range(count)]


def distance(model, anchor):
    """Root mean square difference of logits, in standard deviations of the anchor's."""
    expected = logits(anchor.load_model())
    return float((logits(model) - expected).pow(2).mean().sqrt() / expected.std())


@pytest.mark.parametrize("operator", ["nested", "slice", "expand", "linear"])
def test_every_size_has_its_pair_and_shapes_grow_with_it(chain, operator):
    targets = [find_target(chain, Request(size, operator=operator, tolerance=0.15)) for size in sweep(chain, 90)]
    for size, target in zip(sweep(chain, 90), targets, strict=True):
        if len(target.anchors) == 2:
            upper, lower = target.anchors
            assert lower.parent == upper.name and lower.num_parameters <= size <= upper.num_parameters
    pairs = {tuple(anchor.name for anchor in target.anchors) for target in targets if len(target.anchors) == 2}
    assert pairs == {("a0", "a1"), ("a1", "a2"), ("a2", "a3")}
    sizes = [target.architecture.num_parameters for target in targets]
    assert sizes == sorted(sizes)
    family = targets[0].architecture.family
    for field, dim in family.shape_fields.items():
        if dim != "ffn":
            values = [target.architecture.shape[field] for target in targets]
            assert values == sorted(values)
    if operator in ("nested", "linear"):
        # The share of the lower anchor falls from 1 to 0 on the way up through each pair.
        for pair in (("a1", "a2"), ("a2", "a3")):
            alphas = [t.alpha for t in targets if tuple(a.name for a in t.anchors) == pair]
            assert all(below > above for below, above in itertools.pairwise(alphas) if below != above)
            assert alphas[0] > 0.8 and alphas[-1] < 0.2


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_size_at_an_inner_anchor_is_that_anchor_from_both_sides(chain, operator):
    """Also less than half a neuron away from it."""
    for anchor in chain.anchors[1:-1]:
        for size in (-50, 0, 50):
            model = from_chain(chain, anchor.num_parameters + size, operator=operator)
            assert distance(model, anchor) <= 1e-5
            assert model.config.cbd_trl["anchors"] == [anchor.name]


@pytest.mark.parametrize(("operator", "number"), [("expand", 0), ("slice", -1)])
def test_at_its_far_end_an_operator_of_one_anchor_is_another_model(chain, operator, number):
    end = chain.anchors[number]
    assert distance(from_chain(chain, end.num_parameters, operator=operator), end) > 0.1
    for other in ("nested", "linear"):
        assert distance(from_chain(chain, end.num_parameters, operator=other), end) <= 1e-5


@pytest.mark.parametrize("operator", ["nested", "linear"])
def test_mixing_operators_approach_both_anchors_of_a_pair(chain, operator):
    """By neurons, at the anchor's own depth and width."""
    upper, lower = chain.anchors[1:3]
    ffn = next(field for field, dim in upper.architecture().family.shape_fields.items() if dim == "ffn")
    for anchor, steps in ((upper, (-64, -8, -1)), (lower, (64, 8, 1))):
        distances = [
            distance(
                from_chain(chain, config={**anchor.shape, ffn: anchor.shape[ffn] + step}, operator=operator), anchor
            )
            for step in steps
        ]
        assert distances[0] > distances[1] > distances[2] > 0
        assert distances[2] < 0.5
