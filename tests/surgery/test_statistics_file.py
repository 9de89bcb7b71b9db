"""Statistics on disk."""

import pytest
import torch
from safetensors.torch import save_file

from cbd_trl.surgery.least_squares import least_squares_cut, plain_cut
from cbd_trl.surgery.statistics_file import StoredStatistics, save_statistics
from tests.surgery.helpers import described, every_case, every_family, full_model, moments
from tests.tiny import WIDTH_OF_HEADS


def stored(statistics, architecture, folder):
    save_statistics([statistics], architecture, folder / "statistics.safetensors")
    return StoredStatistics(folder / "statistics.safetensors")


@every_family
def test_statistics_survive_saving(family, tmp_path):
    model = full_model(family, False)
    _, architecture = described(model)
    statistics = moments(model, architecture)
    loaded = stored(statistics, architecture, tmp_path)
    assert loaded.tokens == statistics.tokens == 16 * 24 and loaded.ridge == statistics.ridge
    assert loaded.sites == set(statistics.means) == {site.name for site in architecture.measured_sites}
    for site in statistics.means:
        assert torch.equal(loaded.mean(site), statistics.means[site])
        assert torch.equal(loaded.variances(site), statistics.seconds[site].diagonal())
        torch.testing.assert_close(loaded.variances(site), statistics.variances(site).float(), rtol=1e-6, atol=0)
        expected = statistics.prefix_squares(site).float()
        torch.testing.assert_close(loaded.prefix_squares(site), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
        scale = statistics.variances(site).sqrt()
        # Some of OPT's neurons are silent on this text.
        scale = scale.clamp(min=1e-3 * scale.max())
        gap = (loaded.second(site) - statistics.second(site)).abs() / scale / scale[:, None]
        assert gap.diagonal().max() < 1e-6 and 1e-4 < gap.max() < 0.1, site
    for norm in statistics.squares.keys() - statistics.means.keys():
        assert torch.equal(loaded.variances(norm), statistics.squares[norm])


@pytest.mark.parametrize("kept", [torch.arange(20), torch.arange(32), torch.tensor([0, 1, 4, 5, 8, 9])])
def test_the_stored_factor_is_that_of_the_stored_moments(kept, tmp_path):
    """For a prefix, which is read, and for other coordinates, which are factorised anew."""
    model = full_model("llama", True)
    _, architecture = described(model)
    loaded = stored(moments(model, architecture), architecture, tmp_path)
    site = "model.layers.1.self_attn.o_proj"
    mean, factor = loaded.mean(site), loaded.factor(site, kept)
    covariance = loaded.second(site) - torch.outer(mean, mean)
    found = factor @ factor[kept].T
    scale = covariance.diagonal().sqrt()
    expected = (covariance + loaded.ridge * torch.diag(covariance.diagonal()))[:, kept]
    gap = (found - expected).abs() / scale[:, None] / scale[kept]
    # Where the diagonal was rounded it is the exact one that counts.
    gap[kept, torch.arange(len(kept))] = 0
    assert gap.max() < 1e-4
    assert torch.equal(factor[kept].tril(), factor[kept])


@every_case
def test_a_cut_from_stored_statistics_is_nearly_that_of_exact_ones(family, tied, tmp_path):
    model = full_model(family, tied)
    weights, architecture = described(model)
    smaller = {"width": 24, "group": 3 if family in WIDTH_OF_HEADS else 1, "ffn": 40}
    target = architecture.resized(**smaller)
    statistics = moments(model, architecture)
    exact = least_squares_cut(weights, architecture, statistics, target)
    found = least_squares_cut(weights, architecture, stored(statistics, architecture, tmp_path), target)
    plain = plain_cut(weights, architecture, target)
    readers = [key for key in plain if not torch.equal(exact[key], plain[key]) and key.endswith("weight")]
    assert len(readers) > 12
    for key in readers:
        moved = (exact[key] - plain[key]).norm()
        assert 0 < (found[key] - exact[key]).norm() < 0.15 * moved, key


@pytest.mark.parametrize(
    ("metadata", "found"), [({"cbd_trl_statistics": "2", "tokens": "5"}, "'2'"), ({}, "None"), (None, "None")]
)
def test_another_version_is_refused(metadata, found, tmp_path):
    path = tmp_path / "statistics.safetensors"
    save_file({"model.norm.mean": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=rf"statistics\.safetensors.*{found}"):
        StoredStatistics(path)


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"statistics\.safetensors"):
        StoredStatistics(path)


def test_a_site_that_is_not_there_is_named(tmp_path):
    model = full_model("llama", True)
    _, architecture = described(model)
    loaded = stored(moments(model, architecture, rows=1), architecture, tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.9\.mlp\.down_proj\.vectors"):
        loaded.mean("model.layers.9.mlp.down_proj")
