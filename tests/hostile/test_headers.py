"""Every hostile safetensors file is refused by name, and none takes memory that it only claims."""

import resource
import subprocess
import sys

import pytest
import torch

from cbd_trl.utils.tensor_files import TensorFile
from tests.hostile.headers import DATA, GOOD, HEADERS, file
from tests.hostile.surroundings import snapshot
from tests.hostile.victim import STATISTICS_FILE, plant, use


def read_all(path):
    """Every tensor of a file, as bytes."""
    tensors = TensorFile(path)
    return {name: tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name in tensors}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused(name, tmp_path):
    content, message = HEADERS[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        read_all(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value) and len(str(error.value)) < 2000
    assert snapshot(tmp_path) == before


def test_a_good_file_is_read_and_there_are_enough_others(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    assert read_all(tmp_path / "x.safetensors") == {"a": DATA}
    assert len(HEADERS) >= 20


@pytest.mark.parametrize(
    "name", ["length-of-16-exabytes", "overlap", "shape-overflows-to-fit", "name-twice", "a-pickle"]
)
@pytest.mark.parametrize("place", ["model.safetensors", STATISTICS_FILE])
def test_a_chain_with_it_is_refused(name, place, folder):
    plant(folder, place, HEADERS[name][0])
    for verify in (True, False):
        with pytest.raises(ValueError, match=HEADERS[name][1]):
            use(folder, verify)


_READ = """
import resource, sys
from pathlib import Path
from cbd_trl.utils.tensor_files import read_header
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for file in sys.argv[1:]:
    try:
        read_header(Path(file))
    except ValueError as error:
        print("refused", file)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and limits memory as Linux does")
def test_memory_that_is_only_claimed_is_not_taken(tmp_path):
    assert resource.getpagesize() > 0
    hostile = {name: content for name, (content, _) in HEADERS.items() if name.startswith(("length", "shape", "deep"))}
    many = b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    hostile["many-tensors"] = file(many, b"")
    for name, content in hostile.items():
        (tmp_path / name).write_bytes(content)
    files = [str(tmp_path / name) for name in hostile]
    run = subprocess.run([sys.executable, "-c", _READ, *files], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"refused {path}" for path in files]
