"""A corpus that a teacher writes, for SeqKD (Kim and Rush, arXiv 1606.07947, section 3.2).

Row i of the file completes prompt i // num_return_sequences; its draws depend on the seed and i alone. A run that was
interrupted and went on ends with the same bytes as an unbroken one on the same machine and libraries. For this,
batches are fixed by row number: the rows that a row is padded with may round its logits otherwise. With another batch
size the file is the same but for ties so close that rounding decides them.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cbd_trl.architectures.backbone import own_forward
from cbd_trl.chain.source import Source
from cbd_trl.generation.decoding import DecodingConfig, DrawByRow, RefuseNonNumbers
from cbd_trl.generation.files import CompletionsFile
from cbd_trl.generation.prompts import Prompt, Prompts
from cbd_trl.utils.formatting import readable_name
from cbd_trl.utils.modeling import check_checkpoint, in_eval_mode
from cbd_trl.utils.progress import Progress, progress_shown
from cbd_trl.utils.tokenizers import (
    find_tokenizer,
    teacher_fingerprint,
    text_tokenizer,
    tokenizer_hash,
    vocabulary_rows,
)


@dataclass(frozen=True)
class Completion:
    """What the teacher wrote.

    Attributes:
        text: without special tokens, and without what is left of a character that was cut through.
        tokens: how many, the one that ended it included.
        finish_reason: `stop` if the teacher ended it, `length` if max_new_tokens did.
    """

    text: str
    tokens: int
    finish_reason: str


class Completer:
    """Completes prompts, each as if it were alone.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer.
        decoding: how tokens are chosen.
        seed: of the draws.

    Raises:
        ValueError: if the tokenizer has tokens that the model has no row for.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: DecodingConfig, seed: int
    ) -> None:
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self._decoding = decoding
        self._seed = seed
        highest, rows = max(tokenizer.get_vocab().values()), vocabulary_rows(model)
        if highest >= rows:
            raise ValueError(
                f"The tokenizer has tokens up to id {highest} and the teacher {rows} vocabulary rows: it is another "
                "model's tokenizer. Pass the teacher's as `processing_class`."
            )
        own = model.generation_config
        of_model: Any = None if own is None else own.eos_token_id
        ends = [*(of_model if isinstance(of_model, list) else [of_model]), self._tokenizer.eos_token_id]
        self.ends = sorted({token for token in ends if token is not None})
        # Masked wherever it stands: any token will do.
        self._padding = next(iter([*self.ends, 0]))

    def complete(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> list[Completion]:
        """Complete a batch.

        Args:
            prompts: B of them.
            rows: their numbers in the file, which their draws depend on.

        Returns:
            B completions.

        Raises:
            ValueError: if a logit is not a number.
        """
        width = max(len(prompt.ids) for prompt in prompts)
        padded = [[self._padding] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
        kept = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
        device = self._model.device
        with torch.no_grad(), own_forward(self._model), self._settings_of_our_own() as settings:
            written = self._model.generate(
                generation_config=settings,
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(kept, device=device),
                logits_processor=self._processors(rows, width),
            )
        new_tokens = written[:, width:].tolist()
        return [self._finish(prompt, ids) for prompt, ids in zip(prompts, new_tokens, strict=True)]

    def _processors(self, rows: Sequence[int], width: int) -> LogitsProcessorList:
        decoding, processors = self._decoding, LogitsProcessorList([RefuseNonNumbers()])
        if decoding.do_sample:
            if decoding.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_k > 0:
                processors.append(TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1.0:
                processors.append(TopPLogitsWarper(decoding.top_p))
            if decoding.min_p > 0.0:
                processors.append(MinPLogitsWarper(decoding.min_p))
            processors.append(DrawByRow(self._seed, rows, width, decoding.max_new_tokens))
        return processors

    @contextmanager
    def _settings_of_our_own(self) -> Iterator[GenerationConfig]:
        """`generate` fills what it is not told from the model's generation config: for its time, that is ours."""
        theirs = self._model.generation_config
        ours = self._model.generation_config = GenerationConfig(
            max_new_tokens=self._decoding.max_new_tokens,
            min_new_tokens=self._decoding.min_new_tokens or None,
            num_beams=self._decoding.num_beams,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.ends or None,
            pad_token_id=self._padding,
        )
        try:
            yield ours
        finally:
            self._model.generation_config = theirs

    def _finish(self, prompt: Prompt, ids: list[int]) -> Completion:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        text = self._text(prompt, ids[:end])
        if end is None:
            return Completion(text.rstrip(_HALF_A_CHARACTER), len(ids), "length")
        return Completion(text, end + 1, "stop")

    def _text(self, prompt: Prompt, ids: list[int]) -> str:
        """The text of new tokens; white space between it and the text of the prompt is not lost."""
        if prompt.is_text:
            before, whole = self._decode(prompt.ids), self._decode([*prompt.ids, *ids])
            if whole.startswith(before):
                return whole[len(before) :]
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclasses.dataclass(frozen=True)
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
    """Let a teacher complete every prompt of a dataset, into a file that TRL trains on as it is.

    Killed at any moment and run again, it goes on behind the last whole batch; see the top of this file for what is
    promised. Several processes (`accelerate launch`) share the batches; the file is the same.

    Args:
        model: the teacher, a causal LM, or the path or Hub id of one.
        dataset: see `cbd_trl.generation.prompts.Prompts`.
        output_file: JSON lines, in the order of the dataset; `FILE.settings` beside it tells how they were made.
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
    settings |= _settings(source, teacher, tokenizer, decoding, completer)
    file = CompletionsFile(output_file, settings, batch_size)
    with in_eval_mode(teacher), progress_shown(shown):
        _write(file, prompts, completer, batch_size, total, state)
    return _counted(file.path)


def _read(prompts: Prompts, room: int | None) -> str:
    """The hash of all prompts. One that the teacher cannot read is found here, before the teacher is loaded."""
    return prompts.check(room, Progress("Reading the prompts", range(len(prompts)), unit="rows"))


def _settings(
    source: Source,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: DecodingConfig,
    completer: Completer,
) -> dict[str, Any]:
    """What the completion of a prompt depends on, but for its random numbers."""
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
    # Every process has looked before one of them changes anything.
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
    """Rows of the file, and the tokens of each completion."""
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
            "model_init_kwargs say how to load a teacher, but it is a model already: they would be ignored. Leave "
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
    """How long a prompt may be."""
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
        reasons: Sequence[str] = [json.loads(line)["finish_reason"] for line in lines]
    return Corpus(file, len(reasons), reasons.count("length"))


# A character that is not all there: the cut fell between its bytes.
_HALF_A_CHARACTER = "\ufffd"
