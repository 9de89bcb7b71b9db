"""An anchor's tensors, read from its files when asked for."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cbd_trl.architectures import describe
from cbd_trl.architectures.axes import prefix
from cbd_trl.chain.model import StoredWeights, save_stock_model, stock_model
from tests.tiny import FAMILIES, tiny_model


def saved(folder, family="llama", shard="5GB"):
    """A model on disk; its weight files, the shapes of its tensors, and what the files have them under."""
    model = tiny_model(family)
    model.save_pretrained(folder, max_shard_size=shard)
    architecture = describe(model.config)
    return (
        sorted(folder.glob("*.safetensors")),
        dict(architecture.state_shapes),
        (
            architecture.family.file_names,
            architecture.files,
        ),
    )


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_holds_what_the_files_hold(family, shard, tmp_path):
    """As transformers reads it."""
    files, shapes, names = saved(tmp_path, family, shard)
    assert (len(files) > 2) == (shard == "20KB")
    weights, expected = StoredWeights(files, shapes, *names), tiny_model(family).state_dict()
    assert list(weights) == list(shapes) and len(weights) == len(expected)
    kept = dict(weights)
    for key, tensor in expected.items():
        assert key in weights and torch.equal(weights[key], tensor) and torch.equal(kept[key], tensor)
    with pytest.raises(KeyError):
        weights["nothing"]
    assert "nothing" not in weights


def test_tensors_nobody_wants_are_left_alone(tmp_path):
    files, shapes, _ = saved(tmp_path)
    shapes.pop("model.norm.weight")
    assert "model.norm.weight" not in StoredWeights(files, shapes)


def test_the_file_stays_what_it_is_when_a_tensor_is_changed(tmp_path):
    files, shapes, _ = saved(tmp_path)
    before = files[0].read_bytes()
    tensor = StoredWeights(files, shapes)["model.norm.weight"]
    tensor.fill_(7.0)
    assert tensor.eq(7).all() and files[0].read_bytes() == before


def resident(file: Path) -> int:
    """Bytes of a file that this process has in memory through mappings of it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slice_reads_its_own_pages(tmp_path):
    file, rows = tmp_path / "model.safetensors", 4096
    save_file({"w": torch.ones(rows, 1024)}, file)
    whole = file.stat().st_size
    tensor = StoredWeights([file], {"w": (rows, 1024)})["w"]
    assert resident(file) < 0.1 * whole
    part = prefix(tensor, (("ffn",), ("width",)), {"ffn": rows, "width": 1024}, {"ffn": rows // 8, "width": 512})
    assert part.sum() == rows // 8 * 512
    assert 0.1 * whole < resident(file) < 0.25 * whole
    tensor.sum()
    assert resident(file) > 0.9 * whole


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_read_does_not_stay(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({str(i): torch.ones(512, 1024) for i in range(8)}, file)
    weights = StoredWeights([file], {str(i): (512, 1024) for i in range(8)})
    for tensor in weights.values():
        assert tensor.sum() == 512 * 1024
        assert 0 < resident(file) < 0.3 * file.stat().st_size
    del tensor
    assert resident(file) == 0


def test_what_does_not_fit_the_config_is_refused(tmp_path):
    files, shapes, _ = saved(tmp_path)
    norm = "model.norm.weight"
    with pytest.raises(ValueError, match=r"model\.safetensors lacks \['more'\], which config.json implies"):
        StoredWeights(files, {**shapes, "more": (1,)})
    with pytest.raises(ValueError, match=r"holds model.norm.weight of shape \(32,\), but config.json says \(33,\)"):
        StoredWeights(files, {**shapes, norm: (33,)})
    again = tmp_path / "again.safetensors"
    save_file({norm: torch.ones(32)}, again)
    with pytest.raises(ValueError, match=r"model.norm.weight is in .*model\.safetensors and again in .*again"):
        StoredWeights([*files, again], shapes)
    save_file({norm: torch.ones(32, dtype=torch.float64)}, again)
    with pytest.raises(ValueError, match=r"holds model.norm.weight as F64. Chains store float32, bfloat16, float16"):
        StoredWeights([again], {norm: (32,)})


@pytest.mark.parametrize("damage", ["cut short", "length", "json", "offsets", "empty"])
def test_hostile_headers_are_refused(damage, tmp_path):
    files, shapes, _ = saved(tmp_path)
    whole = files[0].read_bytes()
    broken = {
        "cut short": whole[:-100],
        "length": b"\xff" * 8 + whole[8:],
        "json": whole[:8] + b"[" + whole[9:],
        "offsets": whole.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        "empty": b"",
    }[damage]
    assert broken != whole
    files[0].write_bytes(broken)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as a safetensors file \(.+\)"):
        StoredWeights(files, shapes)


def written(model, folder, dtype, **options):
    """The folder of a model that was written tensor by tensor, and of the same model by transformers."""
    architecture, state = describe(model.config), model.state_dict()
    stock = stock_model(architecture.config, {key: state[key] for key in architecture.state_shapes}, dtype)
    stock.generation_config = model.generation_config
    stock.save_pretrained(folder / "theirs", **options)
    save_stock_model(folder / "ours", architecture, state, dtype, model.generation_config, **options)
    return folder / "ours", folder / "theirs"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_written_tensor_by_tensor_is_the_same_folder(family, tmp_path):
    """Byte for byte."""
    model = tiny_model(family)
    model.generation_config.update(do_sample=True, temperature=0.7)
    folders = written(model, tmp_path, torch.bfloat16)
    ours, theirs = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert ours.keys() == theirs.keys() and len(ours) == 3
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_a_model_written_to_several_files_is_read_as_it_was(tmp_path):
    model = tiny_model("gpt2")
    ours, theirs = written(model, tmp_path, torch.float32, max_shard_size="20KB")
    assert len(list(ours.glob("*.safetensors"))) > 2
    read = AutoModelForCausalLM.from_pretrained(ours).state_dict()
    assert all(torch.equal(read[key], tensor) for key, tensor in model.state_dict().items())
    index, expected = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (ours, theirs))
    assert index["metadata"] == expected["metadata"] and index["weight_map"].keys() == expected["weight_map"].keys()
