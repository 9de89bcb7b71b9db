"""A corpus that a teacher writes, for SeqKD (Kim and Rush, arXiv 1606.07947, section 3.2).

Row i of the file completes prompt i // num_return_sequences; its draws depend on the seed and i alone. A run that was
interrupted and went on ends with the same bytes as an unbroken one on the same machine and libraries. For this,
batches are fixed by row number: the rows that a row is padded with may round its logits otherwise. With another batch
size the file is the same but for ties so close that rounding decides them.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.chain.source import Source
from cbd_trl.generation.completer import Completer
from cbd_trl.generation.decoding import DecodingConfig
from cbd_trl.generation.files import CompletionsFile
from cbd_trl.generation.prompts import Prompts
from cbd_trl.utils.formatting import readable_name
from cbd_trl.utils.modeling import check_checkpoint, in_eval_mode, portable_attention
from cbd_trl.utils.progress import Progress, progress_shown
from cbd_trl.utils.tokenizers import (
    find_tokenizer,
    teacher_fingerprint,
    text_tokenizer,
    tokenizer_hash,
)


@dataclass(frozen=True)
class Corpus:
    """A finished file of completions.

    Attributes:
        file: JSON lines of `prompt`, `completion` and `finish_reason`.
        rows: how many.
        truncated: those that max_new_tokens cut off.
    """

    file: Path
    rows: int
    truncated: int


def generate_completions(
    model: PreTrainedModel | str,
    dataset: Any,
    output_file: str | Path,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    decoding: DecodingConfig | None = None,
    batch_size: int = 8,
    seed: int = 0,
    prompt_tokens: int | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    use_cpu: bool = False,
    disable_tqdm: bool = False,
) -> Corpus:
    """Have a teacher complete every prompt of a dataset, into a file that TRL trains on as it is.

    Killed at any moment and run again, it goes on behind the last whole batch; see the top of this file for what is
    promised. Several processes (`accelerate launch`) share the batches; the file is the same.

    Args:
        model: the teacher, a causal LM, or the path or Hub id of one.
        dataset: see `cbd_trl.generation.prompts.Prompts`.
        output_file: JSON lines, in the order of the dataset; `FILE.settings` beside it records how they were made.
        processing_class: the teacher's tokenizer; None for the one that was saved with it.
        decoding: how tokens are chosen; None for draws from the distribution as it is.
        batch_size: rows that are generated together, on each device.
        seed: of the draws.
        prompt_tokens: how many tokens of each `text` are its prompt.
        model_init_kwargs: of `from_pretrained`, for a path or Hub id. Without a dtype among them, float32.
        use_cpu: do not load the teacher to an accelerator. A model in memory stays where it is.
        disable_tqdm: show no progress.

    Returns:
        what is in the file.

    Raises:
        ValueError: for a value that has no meaning, prompts the teacher cannot read, or a file made in another way.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1.")
    state = PartialState(cpu=use_cpu)
    decoding = decoding or DecodingConfig()
    source = _source(model, model_init_kwargs)
    tokenizer = text_tokenizer(processing_class) or _find_tokenizer(source)
    prompts = Prompts(dataset, tokenizer, prompt_tokens)
    if isinstance(source.place, str):
        check_checkpoint(source.place, role=source.role, **(model_init_kwargs or {}))
    total = len(prompts) * decoding.num_return_sequences
    shown = state.is_main_process and not disable_tqdm
    with progress_shown(shown):
        digest = _read(prompts, _room(source, decoding))
    settings: dict[str, Any] = {"rows": total, "prompts_sha256": digest, "prompt_tokens": prompt_tokens}
    settings |= {"seed": seed, "batch_size": batch_size}
    teacher = _load(source, model_init_kwargs, state)
    completer = Completer(teacher, tokenizer, decoding, seed)
    with in_eval_mode(teacher), portable_attention(teacher), progress_shown(shown):
        settings |= _settings(source, teacher, tokenizer, decoding, completer)
        file = CompletionsFile(output_file, settings, batch_size)
        _write(file, prompts, completer, batch_size, total, state)
    return _counted(file.path)


def _read(prompts: Prompts, room: int | None) -> str:
    """Hash all prompts. One that the teacher cannot read is found here, before the teacher is loaded."""
    return prompts.check(room, Progress("Reading the prompts", range(len(prompts)), unit="rows"))


def _settings(
    source: Source,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: DecodingConfig,
    completer: Completer,
) -> dict[str, Any]:
    """Collect what the completion of a prompt depends on, but for its random numbers."""
    return {
        "teacher": readable_name(source.name),
        **dataclasses.asdict(decoding),
        "ends": completer.ends,
        "teacher_fingerprint": teacher_fingerprint(teacher),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "attn_implementation": getattr(teacher.config, "_attn_implementation", None),
    }


def _write(
    file: CompletionsFile,
    prompts: Prompts,
    completer: Completer,
    batch_size: int,
    total: int,
    state: PartialState,
) -> None:
    # Every process has read the file before one of them changes it.
    state.wait_for_everyone()
    if state.is_main_process:
        file.begin()
    step = batch_size * state.num_processes
    with Progress("Generating", total=total, initial=file.rows, unit="rows") as bar:
        tokens, began = 0, time.monotonic()
        for first in range(file.rows, total, step):
            mine = first + batch_size * state.process_index
            numbers = range(mine, min(mine + batch_size, total))
            done = gather_object(_complete(prompts, completer, numbers, total))
            if state.is_main_process:
                file.append([row for row, _ in done])
            tokens += sum(count for _, count in done)
            bar.update(len(done), f"{tokens / max(time.monotonic() - began, 1e-9):,.0f} tokens/s")
    state.wait_for_everyone()


def _complete(prompts: Prompts, completer: Completer, numbers: range, total: int) -> list[tuple[dict[str, Any], int]]:
    """Complete rows of the file: each row, and the tokens of its completion."""
    if not numbers:
        return []
    repeats = total // len(prompts)
    batch = [prompts[number // repeats] for number in numbers]
    rows = []
    for prompt, completion in zip(batch, completer.complete(batch, numbers), strict=True):
        answer: Any = completion.text
        if not prompt.is_text:
            answer = [{"role": "assistant", "content": completion.text}]
        row = {**prompt.columns, "completion": answer, "finish_reason": completion.finish_reason}
        rows.append((row, completion.tokens))
    return rows


def _source(model: PreTrainedModel | str, init_kwargs: Mapping[str, Any] | None) -> Source:
    if not isinstance(model, str) and init_kwargs:
        raise ValueError(
            "model_init_kwargs are for loading a teacher, but it is a model already: they would be ignored. Leave "
            "them out, or give the teacher's path or Hub id."
        )
    return Source(model, revision=(init_kwargs or {}).get("revision"), role="teacher")


def _load(source: Source, init_kwargs: Mapping[str, Any] | None, state: PartialState) -> PreTrainedModel:
    placed: dict[str, Any] = {"device_map": {"": str(state.device)}}
    # No code of the repository is run.
    return source.model({**placed, **(init_kwargs or {}), "trust_remote_code": False})


def _find_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    tokenizer = find_tokenizer(source.name, source.revision, local_only=not isinstance(source.place, str))
    if tokenizer is None:
        raise ValueError(
            f"No tokenizer was found with the teacher ({source.name or 'a model made in memory'}), and the prompts "
            "have to be read. Pass `processing_class`."
        )
    return tokenizer


def _room(source: Source, decoding: DecodingConfig) -> int | None:
    """Compute the most tokens of a prompt, None for any number."""
    context = getattr(source.config().get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    if context <= decoding.max_new_tokens:
        raise ValueError(
            f"max_new_tokens={decoding.max_new_tokens} and the teacher's context of {context} tokens leave no room "
            "for a prompt. Lower max_new_tokens."
        )
    return context - decoding.max_new_tokens


def _counted(file: Path) -> Corpus:
    with file.open("rb") as lines:
        reasons = [json.loads(line)["finish_reason"] for line in lines]
    return Corpus(file, len(reasons), reasons.count("length"))
