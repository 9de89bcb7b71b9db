"""The plain and the least-squares cut."""

import pytest
import torch

from cbd_trl.architectures import describe
from cbd_trl.architectures.axes import prefix_index
from cbd_trl.surgery.least_squares import Fit, gain_ratio, least_squares_cut, plain_cut
from cbd_trl.surgery.statistics import Statistics
from cbd_trl.surgery.weights import input_matrix, weights_of
from tests.surgery.helpers import (
    TOLERANCE,
    build,
    changed,
    described,
    difference,
    doubled,
    every_case,
    every_family,
    full_model,
    moments,
    reading_module,
    tokens,
)
from tests.tiny import HEADS, MIXTURES, TYING, WIDTH_OF_HEADS, by_kind, head_marks, tiny_model

NARROWER = {"ffn": {"ffn": 40}, "width": {"width": 24}, "group": {"group": 1}, "query": {"query": 1}}
NARROWER_WITH_HEADS = {"ffn": {"ffn": 40}, "width": {"width": 24, "group": 3}}


def _table(family: str) -> dict[str, dict[str, int]]:
    if family in MIXTURES:
        return {**NARROWER, "expert": {"expert": 4}}
    return NARROWER_WITH_HEADS if family in WIDTH_OF_HEADS else NARROWER


def _narrower(family: str, *names: str) -> dict[str, int]:
    table = _table(family)
    return {dim: size for name in names or table for dim, size in table[name].items()}


@every_family
def test_a_cut_that_drops_copies_is_exact(family):
    weights, architecture = described(full_model(family, tied=False))
    reference = build(weights, architecture)
    copies, wide = doubled(weights, architecture)
    big = build(copies, wide)
    assert difference(big, reference) <= TOLERANCE
    # Of a neuron that is silent on the calibration text (ReLU), no copy can be known: 16 rows leave OPT with some.
    cut = least_squares_cut(copies, wide, moments(big, wide, rows=64, ridge=1e-9), architecture)
    assert difference(build(cut, architecture), reference) <= TOLERANCE
    assert difference(build(plain_cut(copies, wide, architecture), architecture), reference) > 0.5


@pytest.mark.parametrize("family", by_kind())
def test_the_ridge_moves_a_cut_away_from_exact(family):
    weights, architecture = described(full_model(family, tied=False))
    reference = build(weights, architecture)
    copies, wide = doubled(weights, architecture)
    big = build(copies, wide)
    errors = [
        difference(build(least_squares_cut(copies, wide, statistics, architecture), architecture), reference)
        for statistics in (moments(big, wide, rows=64, ridge=ridge) for ridge in (1e-9, 1e-4, 1e-1))
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("cut", [plain_cut, "least squares"], ids=["plain", "least squares"])
@every_case
def test_cutting_nothing_changes_nothing(family, tied, cut):
    model = full_model(family, tied)
    weights, architecture = described(model)
    if cut is plain_cut:
        assert not changed(plain_cut(weights, architecture, architecture), weights)
    else:
        assert not changed(
            least_squares_cut(weights, architecture, moments(model, architecture), architecture), weights
        )


def _expected_changes(architecture, name: str) -> set[str]:
    """Tensors that the refit of one dimension may touch: the readers of the cut stream, the gains before them, and
    those of norms over the cut outputs."""
    keys = set()
    for site in architecture.sites:
        # The output projection reads "group.query.dim", and some families lose heads with their width.
        heads = name in ("group", "query") or (name == "width" and architecture.config.model_type in WIDTH_OF_HEADS)
        # A convolution loses channels with the width.
        cut = {"width": name == "width", "ffn": name == "ffn", "group": heads, "conv": name == "width"}
        if site.routed or not cut.get(site.axis[0], False):
            continue
        final = site is architecture.sites[-1]
        readers = site.readers
        if final and architecture.tied:
            # Scaled embeddings stay what they are.
            readers = [architecture.family.embedding] if architecture.embedding_scale == 1 else []
        modules = (*readers, site.name) if site.norm else readers
        keys |= {f"{module}.weight" for module in modules} | {f"{reader}.bias" for reader in readers}
    keys |= {f"{norm.name}.weight" for norm in architecture.output_norms if name in norm.axis}
    if name == "width" and architecture.family.bare_norms:
        # The stream is larger by what the norm of the embeddings makes them.
        keys |= {key for key in architecture.tensors if ".o_proj." in key or ".fc2." in key}
    return keys & set(architecture.tensors)


@pytest.mark.parametrize(
    ("family", "tied", "name"),
    [
        pytest.param(family, tied, name, marks=head_marks(family, tied))
        for family, tied in HEADS
        for name in _table(family)
    ],
)
def test_only_readers_of_what_is_cut_are_refitted(family, tied, name):
    model = full_model(family, tied)
    weights, architecture = described(model)
    target = architecture.resized(**_narrower(family, name))
    cut = least_squares_cut(weights, architecture, moments(model, architecture), target)
    plain = plain_cut(weights, architecture, target)
    assert changed(cut, plain) == _expected_changes(architecture, name)


@every_case
def test_cut_models_run_and_nothing_is_changed_in_place(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    before = {key: tensor.clone() for key, tensor in weights.items()}
    target = architecture.resized(**_narrower(family))
    cut = least_squares_cut(weights, architecture, moments(model, architecture), target)
    assert build(cut, target)(tokens()).logits.isfinite().all()
    assert {tensor.dtype for tensor in cut.values()} == {torch.float64}
    assert not changed(weights, before)


@every_family
@pytest.mark.parametrize("fold", [False, True])
def test_low_precision_weights_are_refitted_in_float32(family, fold):
    model = full_model(family, True)
    weights, architecture = described(model)
    target = architecture.resized(**_narrower(family))
    statistics = moments(model, architecture)
    low = {key: tensor.to(torch.bfloat16) for key, tensor in weights.items()}
    cut = least_squares_cut(low, architecture, statistics, target, fold=fold)
    exact = {key: tensor.double() for key, tensor in low.items()}
    expected = least_squares_cut(exact, architecture, statistics, target, fold=fold)
    for key, tensor in cut.items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("kept", "rows"),
    [(slice(0, 4), slice(4, 7)), (torch.tensor([0, 2, 3]), torch.arange(7))],
    ids=["apart", "centered"],
)
def test_the_gradient_of_a_refit_is_that_of_its_differences(kept, rows):
    generator = torch.Generator().manual_seed(0)
    matrix, gain = (torch.randn(size, 7, generator=generator, dtype=torch.float64) for size in (5, 1))
    index = torch.arange(7)
    fit = Fit(kept, rows, torch.randn(len(index[rows]), len(index[kept]), generator=generator).double(), None)
    inputs = matrix.requires_grad_(), gain[0].requires_grad_()
    torch.autograd.gradcheck(lambda matrix, gain: fit.refitted(matrix, 0.5, gain), inputs)
    torch.autograd.gradcheck(lambda matrix: fit.refitted(matrix, 0.5), inputs[:1])


@pytest.mark.parametrize("dim", ["ffn", "group"])
@every_family
def test_refitted_projections_equal_ordinary_least_squares(family, dim):
    """On the calibration tokens, the cut projection gives the best fit of the full one's output from what is kept."""
    if family in WIDTH_OF_HEADS and dim == "group":
        pytest.skip("its width is that of its heads: it cannot lose them alone")
    if family in MIXTURES and dim == "ffn":
        pytest.skip("what is left of an expert stays as it is")
    model = full_model(family, True)
    weights, architecture = described(model)
    target = architecture.resized(**_narrower(family, dim))
    cut = least_squares_cut(weights, architecture, moments(model, architecture, ridge=1e-12), target)

    site = next(site for site in architecture.sites if site.axis[0] == dim)
    reader, streams = site.readers[0], []
    handle = model.get_submodule(reader).register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    with torch.no_grad():
        model(tokens(16, seed=1))
        handle.remove()
        full = model.get_submodule(reader)(streams[0]).flatten(0, -2)
    axes = architecture.tensors[f"{reader}.weight"]
    narrow = input_matrix(cut[f"{reader}.weight"], axes, site.axis)
    # Groups and neurons are the outermost dimension, so what is kept is a prefix.
    kept = streams[0].flatten(0, -2)[:, : narrow.shape[1]]
    bias = cut.get(f"{reader}.bias")
    fitted = kept @ narrow.T + (0 if bias is None else bias)
    features = kept if bias is None else torch.cat([kept, torch.ones_like(kept[:, :1])], 1)
    best = features @ torch.linalg.lstsq(features, full).solution
    # The moments are stored in float32.
    torch.testing.assert_close(fitted, best, rtol=0, atol=1e-3 * float(full.std()))


@every_family
def test_refitted_readers_of_the_stream_equal_ordinary_least_squares(family):
    """The same for what reads the stream; the features are the kept channels as the narrow norm leaves them."""
    model = full_model(family, tied=False)
    weights, architecture = described(model)
    target = architecture.resized(**_narrower(family, "width"))
    cut = least_squares_cut(weights, architecture, moments(model, architecture, ridge=1e-12), target)
    for site in (site for site in architecture.sites if site.axis == ("width",)):
        streams = []
        handle = reading_module(model, architecture, site.readers[0])[0].register_forward_pre_hook(
            lambda _, inputs, streams=streams: streams.append(inputs[0].detach().flatten(0, -2))
        )
        with torch.no_grad():
            model(tokens(16, seed=1))
        handle.remove()
        gain = weights[f"{site.name}.weight"] if site.norm else torch.ones(32)
        shift = weights.get(f"{site.name}.bias", torch.zeros_like(gain))
        kept = ((streams[0] - shift) / gain)[:, :24]
        if architecture.family.norm_type == "layer":
            kept = kept - kept.mean(-1, keepdim=True)
        kept = kept * gain[:24] + shift[:24]
        for reader in site.readers:
            biased, axes = f"{reader}.bias" in weights, architecture.tensors[f"{reader}.weight"]
            features = torch.cat([kept, torch.ones_like(kept[:, :1])], 1) if biased else kept
            full = streams[0] @ input_matrix(weights[f"{reader}.weight"], axes, site.axis).T
            fitted = kept @ input_matrix(cut[f"{reader}.weight"], axes, site.axis).T
            if biased:
                full, fitted = full + weights[f"{reader}.bias"].flatten(), fitted + cut[f"{reader}.bias"].flatten()
            # Centered, they are linearly dependent, but for rounding.
            best = features @ torch.linalg.lstsq(features, full, rcond=1e-9, driver="gelsd").solution
            # Where heads go with the width their outputs are gone.
            outputs = tuple(dim for axis in axes if axis != site.axis for dim in axis)
            best = best[:, prefix_index(outputs, architecture.sizes, target.sizes)]
            torch.testing.assert_close(fitted, best, rtol=0, atol=1e-3 * float(full.std()))


@every_family
def test_gain_ratio_is_that_of_the_streams(family):
    """What norms get in the model itself: what one of the kept coordinates divides by, over what the full one does."""
    model = full_model(family, True)
    weights, architecture = described(model)
    statistics = moments(model, architecture)
    over_outputs = [norm for norm in architecture.output_norms if norm.axis != ("dim",)]
    for norm in [site for site in architecture.sites if site.norm] + over_outputs:
        seen = []
        module = model.get_submodule(norm.name)
        handle = module.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model(tokens(16, seed=1))
        handle.remove()
        gain = weights[f"{norm.name}.weight"]
        tied_scale = architecture.embedding_scale if norm is architecture.sites[-1] else 1
        # The last call: nanochat's final norm normalizes the embeddings first.
        stream = ((seen[-1] - getattr(module, "bias", torch.zeros(()))) / (gain * tied_scale)).detach()
        index = torch.arange(len(gain))[1 if norm in over_outputs else 0 : len(gain) * 3 // 4]
        kept = stream[..., index]
        if architecture.family.norm_type == "layer":
            kept = kept - kept.mean(-1, keepdim=True)
        ratio = gain_ratio(statistics, norm, architecture.family.norm_type, index)
        assert ratio == pytest.approx(float((kept.pow(2).mean() / stream.pow(2).mean()).sqrt()), rel=1e-4)


@pytest.mark.parametrize("family", TYING)
def test_a_tied_table_moves_by_its_share(family):
    model = full_model(family, tied=True)
    weights, architecture = described(model)
    target = architecture.resized(**_narrower(family, "width"))
    statistics = moments(model, architecture)
    key = f"{architecture.family.embedding}.weight"
    none, half, whole = (
        least_squares_cut(weights, architecture, statistics, target, tied_head_share=share)
        for share in (0.0, 0.5, 1.0)
    )
    assert torch.equal(none[key], plain_cut(weights, architecture, target)[key])
    torch.testing.assert_close(half[key], (none[key] + whole[key]) / 2)
    assert changed(half, whole) == {key}


@pytest.mark.parametrize("cut", ["plain", "least squares"])
def test_a_cut_makes_nothing_larger(cut):
    model = tiny_model("llama")
    architecture = describe(model.config)
    weights = weights_of(model, architecture)
    wider = architecture.resized(width=40)
    with pytest.raises(ValueError, match="width"):
        if cut == "plain":
            plain_cut(weights, architecture, wider)
        else:
            least_squares_cut(weights, architecture, Statistics({}, {}, {}, 1), wider)
