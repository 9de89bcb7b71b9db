"""What from_chain reads, and what it holds: only what a target needs, tensor by tensor."""

import dataclasses
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbd_trl import Chain, from_chain
from cbd_trl.chain.manifest import read_manifest, write_manifest
from cbd_trl.chain.model import build_model
from cbd_trl.surgery.weights import LazyWeights
from cbd_trl.targets.operators import OPERATORS, Pair, Plan
from cbd_trl.utils.files import sha256_of
from tests.chain.helpers import BLOCKS, DEEP, WIDE, between, random_pair, same_weights
from tests.surgery.helpers import every_family


def spied(weights, counts):
    """The same weights; every access is counted."""

    def tensor(key):
        counts[key] += 1
        return weights[key]

    return LazyWeights(weights, tensor)


def reads(pair: Pair, operator: str, plan: Plan):
    """Which layers and outer tensors of the upper and of the lower anchor a whole target reads, and how often."""
    upper, lower = Counter(), Counter()
    watched = dataclasses.replace(pair, upper=spied(pair.upper, upper), lower=spied(pair.lower, lower))
    made, _ = OPERATORS[operator].make(watched, plan)
    assert not upper and not lower, "nothing is read before it is needed"
    dict(made)
    return upper, lower


def layers(counts, architecture):
    return {architecture.split_name(key)[0] for key in counts} - {None}


@pytest.mark.parametrize("operator", ["nested", "patch"])
@every_family
def test_swapped_blocks_read_the_upper_anchor_and_the_others_the_lower(family, operator):
    pair = random_pair(family, True, "depth")
    upper, lower = reads(pair, operator, Plan(between(pair)))
    assert layers(upper, pair.upper_architecture) == {layer for i in (2, 3) for layer in BLOCKS[i]}
    assert layers(lower, pair.lower_architecture) == {0, 1}
    outer = {key for key in pair.lower if pair.lower_architecture.split_name(key)[0] is None}
    assert outer <= lower.keys() and not outer & upper.keys()
    assert set(upper.values()) == set(lower.values()) == {1}


@every_family
def test_nested_in_both_reads_what_each_layer_stands_on(family):
    """Of upper layers neither swapped in nor stood for (1 here), and of lower ones that are swapped out, nothing."""
    pair = random_pair(family, True, "both")
    upper, lower = reads(pair, "nested", Plan(between(pair)))
    assert layers(upper, pair.upper_architecture) == {0, 2, 3, 4, 5}
    assert layers(lower, pair.lower_architecture) == {0, 1}
    for counts in (upper, lower):
        for key, count in counts.items():
            module, kind = key.rsplit(".", 1)
            # A matrix is read for itself and for its bias, which takes up what is folded and fitted.
            if kind == "weight" and not module.endswith(("norm", "ln_1", "ln_2", "ln_f")):
                assert count == 1 or (count <= 3 and f"{module}.bias" in counts), key


@pytest.mark.parametrize("what", ["depth", "width", "both"])
def test_operators_of_one_anchor_read_that_anchor(what):
    pair = random_pair("llama", True, what)
    upper, lower = reads(pair, "slice", Plan(between(pair)))
    assert upper and not lower
    kept = set(range(6)) if what == "width" else {0, 1, 3, 4, 5}
    assert layers(upper, pair.upper_architecture) == kept
    upper, lower = reads(pair, "expand", Plan(between(pair)))
    assert lower and not upper


@every_family
def test_a_site_is_solved_once_for_all_its_readers(family):
    pair = random_pair(family, True, "width")
    counts = Counter()

    class Counting:
        ridge = pair.statistics.ridge

        def __getattr__(self, name):
            return getattr(pair.statistics, name)

        def factor(self, site, kept):
            counts[site] += 1
            return pair.statistics.factor(site, kept)

    dict(OPERATORS["nested"].make(dataclasses.replace(pair, statistics=Counting()), Plan(between(pair)))[0])
    # Twice, where only some of them have a bias: with an intercept and without.
    tensors = pair.upper_architecture.tensors
    kinds = {
        site.name: {f"{reader}.bias" in tensors for reader in site.readers} for site in pair.upper_architecture.sites
    }
    assert counts == {site: len(kinds[site]) for site in counts} and counts


@pytest.fixture(scope="module")
def rewritten(chain_folder, tmp_path_factory):
    """The chain with its weights in other files, or another dtype."""

    def make(change):
        folder = tmp_path_factory.mktemp("rewritten") / "chain"
        shutil.copytree(chain_folder, folder)
        manifest = read_manifest(folder)
        anchors = []
        for anchor in manifest.anchors:
            dtype = change(folder / anchor.name, load_file(folder / anchor.name / "model.safetensors"))
            files = {
                path.name: sha256_of(path)
                for path in (folder / anchor.name).iterdir()
                if path.name in anchor.files or path.suffix == ".safetensors"
            }
            anchors.append(anchor.model_copy(update={"files": files, "dtype": dtype}))
        write_manifest(folder, manifest.model_copy(update={"anchors": anchors}))
        return Chain.from_pretrained(folder)

    return make


def in_shards(folder, weights):
    (folder / "model.safetensors").unlink()
    for number in range(3):
        part = {key: tensor for i, (key, tensor) in enumerate(sorted(weights.items())) if i % 3 == number}
        save_file(part, folder / f"model-{number + 1:05}-of-00003.safetensors", metadata={"format": "pt"})
    return "float32"


def in_bfloat16(folder, weights):
    low = {key: tensor.to(torch.bfloat16) for key, tensor in weights.items()}
    save_file(low, folder / "model.safetensors", metadata={"format": "pt"})
    return "bfloat16"


@pytest.mark.parametrize("operator", OPERATORS)
def test_sharded_anchors_give_the_same_model(chain, rewritten, operator):
    shards = rewritten(in_shards)
    for shape in (DEEP, WIDE) if operator != "patch" else (DEEP,):
        expected = from_chain(chain, config=shape, operator=operator).state_dict()
        assert same_weights(from_chain(shards, config=shape, operator=operator).state_dict(), expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bfloat16_anchors_are_solved_in_float32(rewritten, operator):
    """What is made of them is rounded once, at the end."""
    low = rewritten(in_bfloat16)
    for shape in (DEEP, WIDE) if operator != "patch" else (DEEP,):
        exact = from_chain(low, config=shape, operator=operator, dtype="float32").state_dict()
        made = from_chain(low, config=shape, operator=operator).state_dict()
        assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
        assert same_weights(made, {key: tensor.to(torch.bfloat16) for key, tensor in exact.items()})
        if shape is WIDE:
            assert any(not torch.equal(tensor, tensor.to(torch.bfloat16).float()) for tensor in exact.values())


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "linear"])
def test_every_parameter_has_memory_of_its_own(chain, operator):
    """Layers made of one tensor train apart, and training changes no file."""
    files = [anchor.path / "model.safetensors" for anchor in chain.anchors]
    before = [file.read_bytes() for file in files]
    model = from_chain(chain, config=DEEP, operator=operator)
    parameters = dict(model.named_parameters())
    assert len({tensor.untyped_storage().data_ptr() for tensor in parameters.values()}) == len(parameters)
    for i, tensor in enumerate(parameters.values()):
        tensor.data.fill_(float(i))
    assert all(tensor.eq(i).all() for i, tensor in enumerate(parameters.values()))
    assert [file.read_bytes() for file in files] == before
    assert from_chain(chain, config=DEEP, operator=operator).model.norm.weight.ne(0).any()


def test_a_model_holds_the_tensors_it_is_given():
    """No second copy of the target, but one for a tensor that is a part of another or is given twice."""
    pair = random_pair("llama", True, "depth")
    given = {key: tensor.float().clone() for key, tensor in pair.lower.items()}
    shared, part = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    given[shared] = given["model.layers.0.mlp.up_proj.weight"]
    given[part] = torch.cat([given[part], given[part]])[: len(given[part])]
    made = build_model(pair.lower_architecture, given, torch.float32).state_dict()
    assert all(torch.equal(made[key], tensor) for key, tensor in given.items())
    copied = {key for key, tensor in given.items() if made[key].data_ptr() != tensor.data_ptr()}
    assert copied == {shared, part}


def test_an_anchor_that_is_not_used_may_be_damaged(chain_folder, tmp_path):
    folder = shutil.copytree(chain_folder, tmp_path / "chain")
    smallest = Chain.from_pretrained(folder).anchors[2]
    (smallest.path / "model.safetensors").write_bytes(b"")
    assert from_chain(folder, config=DEEP).config.num_hidden_layers == 5
    with pytest.raises(ValueError, match=r"model.safetensors"):
        from_chain(folder, config=WIDE)
    with pytest.raises(ValueError, match=r"model.safetensors"):
        Chain.from_pretrained(folder)
