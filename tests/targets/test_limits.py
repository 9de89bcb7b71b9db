"""The largest model that a device holds."""

import itertools

import pytest

from cbd_trl import Chain, from_chain
from cbd_trl.architectures import describe
from cbd_trl.shapes.budget import FlopCount
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.storage import Memory
from cbd_trl.targets.limits import Limits, read_limits
from cbd_trl.targets.request import Request, find_target, find_targets, within_limits
from cbd_trl.targets.shape_search import score_by_statistics
from tests.chain.helpers import random_chain


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Chain:
    return random_chain(tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def path(both) -> list:
    """Every stock shape that a request for its own size gives, by trying all of them."""
    large, small = both.anchors
    ranges = [range(small.shape[field], value + 1, step) for field, value, step in _steps(large.shape)]
    found = []
    for values in itertools.product(*ranges):
        architecture = cut_architecture(large.architecture(), dict(zip(large.shape, values, strict=True)))
        target = find_target(both, Request(architecture.num_parameters))
        if target.architecture.shape == architecture.shape:
            found.append(target.architecture)
    return found


def _steps(shape):
    return [(field, value, 8 if "size" in field else 1) for field, value in shape.items()]


def memory_of(architecture, limits: Limits) -> int:
    return sum(Memory.of(architecture, limits.storage, limits.context_length))


@pytest.mark.parametrize("storage", ["float32", "nf4", "q4_0", "q4_k_m"])
def test_the_largest_on_the_line_that_fits(both, path, storage):
    """Against all shapes on the line, though a larger one may take less memory where its rows are whole blocks."""
    sizes = [memory_of(one, Limits(1, 64, storage)) for one in path]
    low, high = min(sizes), max(sizes)
    for step in range(8):
        limits = Limits(low + (high - low) * step // 8, 64, storage)
        wanted = max(one.num_parameters for one in path if memory_of(one, limits) <= limits.memory_limit)
        request = within_limits(both, Request(limits=limits))
        found = find_target(both, request).architecture
        assert (request.size, found.num_parameters) == (wanted, wanted)
        assert memory_of(found, limits) <= limits.memory_limit
    if storage.startswith("q4"):
        by_size = [
            size for _, size in sorted((one.num_parameters, size) for one, size in zip(path, sizes, strict=True))
        ]
        assert by_size != sorted(by_size)


def test_a_limit_of_flops_alone_and_beside_memory(both, path):
    flops = sorted(FlopCount.of(one) for one in path)[len(path) // 2]
    alone = within_limits(both, Request(limits=Limits(flops_limit=flops)))
    assert alone.size == max(one.num_parameters for one in path if FlopCount.of(one) <= flops)
    tighter = memory_of(find_target(both, alone).architecture, Limits(1, 64)) * 9 // 10
    together = within_limits(both, Request(limits=Limits(tighter, 64, flops_limit=flops)))
    assert together.size == within_limits(both, Request(limits=Limits(tighter, 64))).size < alone.size


def test_a_longer_context_leaves_less_for_the_weights(both):
    sizes = [from_chain(both, memory_limit="300kB", context_length=n).num_parameters() for n in (1, 64)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 2


def test_the_model_and_what_it_records(both, caplog):
    model = from_chain(both, memory_limit="150kB", context_length=64, storage="q8_0", dtype="bfloat16")
    assert "shape_search=16 compares such shapes" in caplog.text
    assert memory_of(describe(model.config), Limits(1, 64, "q8_0")) <= 150_000
    assert model.config.cbd_trl["limits"] == {
        "memory_limit": 150_000,
        "context_length": 64,
        "storage": "q8_0",
        "flops_limit": None,
    }
    whole = from_chain(both, memory_limit="1GB", context_length=64)
    assert whole.num_parameters() == both.anchors[0].num_parameters
    assert "large, is all that this chain has for these limits" in caplog.text


def test_shapes_of_a_limit_are_compared(both):
    limits = Limits(150_000, 64, "q8_0")
    request = within_limits(both, Request(shape_search=6, limits=limits))
    line, *others = find_targets(both, request)
    assert line.architecture.num_parameters == request.size
    assert len({tuple(one.architecture.shape.items()) for one in others}) == len(others) > 2
    for one in others:
        assert 0.9 * limits.memory_limit <= memory_of(one.architecture, limits) <= limits.memory_limit
    sizes = [one.architecture.num_parameters for one in (line, *others)]
    assert max(sizes) == sizes[1] > 1.03 * sizes[0]
    best = score_by_statistics([line, *others], request)[0]
    model = from_chain(both, memory_limit=150_000, context_length=64, storage="q8_0", shape_search=6)
    assert model.config.cbd_trl["shape"] == best.architecture.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"memory_limit": "1GB", "context_length": 8, "num_parameters": 1e6},
            "num_parameters=1000000.0 names another",
        ),
        ({"flops_limit": 1e6, "config": {"num_hidden_layers": 5}}, "flops_limit makes the largest model"),
        ({"storage": "q8_0", "num_parameters": 1e6}, "storage='q8_0' has no meaning without memory_limit"),
        ({"memory_limit": "1GB"}, "context_length=None must be a number of tokens"),
        ({"memory_limit": "1GB", "context_length": 10**6}, "context_length=1,000,000 is more than the "),
        ({"memory_limit": "1 qB", "context_length": 8}, "'1 qB' must be a positive number of bytes"),
        ({"memory_limit": "1,2GB", "context_length": 8}, "'1,2GB' must be a positive number of bytes"),
        ({"memory_limit": "1GB", "context_length": 8, "storage": "q4_km"}, "Did you mean 'q4_k_m'"),
        ({"memory_limit": "9kB", "context_length": 8}, r"The smallest anchor, small, takes .* kB \(.* kB of weights"),
        ({"flops_limit": 9.0}, r"FLOPs a token of flops_limit=9\. Raise the limit, or build a chain"),
        ({"flops_limit": -1}, "flops_limit=-1 must be a positive number"),
    ],
)
def test_limits_that_cannot_be_kept(both, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_chain(both, **arguments)


@pytest.mark.parametrize(
    ("text", "count"),
    [("250MB", 250e6), ("1.5 GiB", 1.5 * 2**30), (1024, 1024), ("2e6", 2e6), ("1,200kB", 1.2e6), ("3 mib", 3 * 2**20)],
)
def test_bytes_as_people_write_them(text, count):
    limits = read_limits(text, 8, None, None)
    assert limits is not None and limits.memory_limit == count
