"""Save the model of a target in one piece with its card, or name one that is not saved."""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.cards.card import PICTURE, code, plain, render_card, save_card, usage_lines
from cbd_trl.cards.metadata import card_metadata, license_sentence
from cbd_trl.chain.cards import AnyChain, chain_name, chain_origins, copy_picture, hub_id, weight_hashes
from cbd_trl.chain.chain import Chain
from cbd_trl.targets.operators import OPERATORS
from cbd_trl.utils.formatting import anchor_name, format_count, with_active


def check_replaceable(directory: Path) -> None:
    """Check that a folder is empty or holds a model that from_chain saved: it is replaced as a whole.

    Raises:
        ValueError: it holds something else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    config = directory / "config.json"
    if (
        not config.is_file()
        or "cbd_trl" not in json.loads(config.read_text(encoding="utf-8"))
        or any(entry.is_dir() for entry in directory.iterdir())
    ):
        raise ValueError(
            f"save_directory={str(directory)!r} holds something other than a model that from_chain saved. Choose an "
            "empty or new folder."
        )


def save_model(model: PreTrainedModel, chain: Chain, directory: Path) -> None:
    """Write model, the upper anchor's tokenizer, provenance and card under a temporary name, then rename."""
    provenance = model.config.cbd_trl
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary, before = (directory.parent / f".{kind}-{directory.name}-{os.getpid()}" for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        chain[provenance["anchors"][0]].load_tokenizer().save_pretrained(temporary)
        copy_picture(chain, temporary)
        save_card(temporary, target_card(chain, provenance, directory.name))
        if directory.exists():
            directory.rename(before)
        try:
            temporary.rename(directory)
        except OSError:
            if before.exists():
                before.rename(directory)
            raise
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def name_unsaved(model: PreTrainedModel, chain: Chain) -> None:
    """Name a model that is saved nowhere, so that its tokenizer is found and other weights are not.

    Trainers look up its tokenizer, and some a reference model, by the name in its config: a folder that has all that a
    saved target has but the weights, as long as the process lives. peft takes the model's own name for the base of an
    adapter, and other people read it: a sentence, which no library finds a model by.
    """
    provenance = model.config.cbd_trl
    size, source = anchor_name(provenance["num_parameters"]), provenance["chain"]
    folder = Path(tempfile.mkdtemp(dir=_unsaved_folder().name)) / f"{size}-from-{Path(source).name}-not-saved"
    folder.mkdir()
    upper = chain[provenance["anchors"][0]]
    upper.need(*upper.small_files)
    for name in upper.small_files:
        if "config" not in name or name.startswith("tokenizer"):
            _link((upper.path / name).resolve(), folder / name)
    model.config.save_pretrained(folder)
    save_card(folder, target_card(chain, provenance, folder.name))
    model.config._name_or_path = str(folder)
    model.name_or_path = (
        f"{size} from {source}, made in memory and saved nowhere: give cbd_trl.from_chain a save_directory"
    )


def target_card(chain: AnyChain, made: Mapping[str, Any], name: str) -> str:
    """Render the card of a target.

    Args:
        chain: that it was made from.
        made: how, from `model.config.cbd_trl`.
        name: of the folder it is saved in.

    Returns:
        the text of its README.md.
    """
    origins, before = chain_origins(chain), hub_id(chain)
    # An anchor as it is has no row.
    mixed = made["operator"] in OPERATORS and len(OPERATORS[made["operator"]].sources) > 1
    data = card_metadata(
        origins,
        relation="merge" if mixed else "finetune",
        name=plain(name),
        tags=["from_chain"],
        before=[] if before is None else [before],
    )
    size = format_count(made["num_parameters"])
    total = made["num_parameters"]
    count = with_active(f"{total:,}", total, made.get("active_parameters", total))
    return render_card(
        data,
        title=f"{plain(name)}: {size} from {chain_name(chain)}",
        summary=f"A stock transformers model of {count} parameters that "
        "[cbd_trl](https://arxiv.org/abs/2605.07783) made from the weights of a chain, without a teacher and without "
        "training.",
        facts=dict(_facts(chain, made)),
        use=usage_lines(name),
        license=license_sentence(origins),
        picture=(chain.path / PICTURE).is_file(),
    )


@functools.cache
def _unsaved_folder() -> tempfile.TemporaryDirectory:
    """Make the folder of the names of unsaved models, which is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="cbd_trl-")


def _link(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(file)
    except OSError:
        # A system that does not let everyone make links.
        shutil.copyfile(file, place)


def _facts(chain: AnyChain, made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "chain", code(chain_name(chain)) + (f" at commit {code(chain.revision)}" if chain.revision else "")
    yield "operator", code(made["operator"])
    if made["alpha"] is not None:
        yield "weight of the lower anchor", f"{made['alpha']:.4g}"
    if "swapped_blocks" in made:
        yield "blocks of the upper anchor", code(made["swapped_blocks"])
    if "calibration_tokens" in made:
        yield "chosen by its loss on", f"{made['calibration_tokens']:,} tokens"
    yield "shape", plain(describe_shape(made["shape"]))
    for anchor in chain.anchors:
        if anchor.name in made["anchors"]:
            digests = ", ".join(map(code, weight_hashes(anchor).values()))
            seen = f"{anchor.num_parameters:,} parameters, {anchor.tokens_seen:,} tokens seen"
            yield f"anchor {anchor.name}", f"{seen}, sha256 {digests}"
    if "engine_limit" in made:
        yield "outside of transformers", plain(made["engine_limit"])
    yield "tokens seen here", "0"
