"""Does training from a cache end where training with the teacher does?

    python -m benchmarks.distill_cache --teacher DIR --gsm8k gsm8k_train.jsonl --output runs/cache

The same student is trained on the same rows in the same order, once with the teacher in memory and once from its
top-64 cache. Then the student's full-vocabulary forward KL to the teacher, in nats per token, on rows that neither
saw (the last tenth of the file). Interrupted, it goes on at the run that is not done.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel

from benchmarks.tables import machine, markdown
from benchmarks.teacher_cache import ensure_cache
from benchmarks.workload import PACKS_PER_STEP, Workload, add_inputs, trainer_settings, workload_from
from cbd_trl import DistillConfig, DistillTrainer
from cbd_trl.utils.files import Results, write_text


@torch.no_grad()
def full_kl(student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Sequence[int]]) -> float:
    """KL(teacher || student) over the whole vocabulary.

    Written out here, because a benchmark should not measure a loss with the loss.

    Args:
        student: any mode, no dropout.
        teacher: likewise.
        rows: token ids; all but the last token of each row predict.

    Returns:
        nats per predicted token.
    """
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        student_log, teacher_log = (
            F.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], -1) for model in (student, teacher)
        )
        total += F.kl_div(student_log, teacher_log, reduction="sum", log_target=True).item()
        tokens += len(row) - 1
    return total / tokens


def held_out_rows(workload: Workload, tokens: int) -> list[list[int]]:
    """The first held-out rows, until they have so many tokens."""
    rows: list[list[int]] = []
    for row in workload.token_rows(held_out=True):
        if sum(map(len, rows)) >= tokens:
            break
        rows.append(row)
    return rows


def train(workload: Workload, rows: Dataset, steps: int, cache: Path | None, divergence: str) -> PreTrainedModel:
    """The student after so many optimizer steps, from the cache or, without one, with the teacher."""
    source: dict[str, Any] = {} if cache is None else {"teacher_cache": str(cache)}
    trainer = DistillTrainer(
        workload.load_student(),
        workload.load_teacher() if cache is None else None,
        DistillConfig(
            **trainer_settings(workload, steps, PACKS_PER_STEP, 1),
            packing=True,
            kd_weight=1.0,
            ce_weight=0.5,
            divergence=divergence,
            **source,
        ),
        rows,
        processing_class=workload.tokenizer(),
    )
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of about 1k tokens")
    parser.add_argument("--held-out-tokens", type=int, default=10_000)
    parser.add_argument("--kind", default="top_k", choices=("top_k", "sampled", "hidden"), help="of the cache")
    parser.add_argument("--divergence", default="forward_kl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    workload = workload_from(options)
    workload.prepare()
    rows, held_out = workload.rows_for(options.steps), held_out_rows(workload, options.held_out_tokens)
    results = Results(workload.output / "cache.json")
    settings = f"steps={options.steps} {options.divergence} seed={options.seed} held_out={len(held_out)}"
    folder = workload.output / f"teacher-cache-{options.kind}"
    bytes_per_token = ensure_cache(workload, rows, folder, options.kind)
    teacher = workload.load_teacher()

    def kl_of(name: str, cache: Path | None) -> float:
        place = f"{name} {settings}"
        if results.get(place) is None:
            untrained = name == "untrained"
            student = (
                workload.load_student()
                if untrained
                else train(workload, rows, options.steps, cache, options.divergence)
            )
            results.put(place, full_kl(student.eval(), teacher, held_out))
            if not untrained:
                student.save_pretrained(workload.output / f"student-{name}")
            del student
            gc.collect()
        return results.get(place)

    kl = {
        "untrained": kl_of("untrained", None),
        "online": kl_of("online", None),
        options.kind: kl_of(options.kind, folder),
    }
    tokens = sum(map(len, held_out)) - len(held_out)
    lines = [[name, f"{value:.4f}", f"{value - kl['online']:+.4f}"] for name, value in kl.items()]
    text = markdown(["student", f"KL to the teacher, {tokens} held-out tokens", "against online (|.| <= 0.02)"], lines)
    text += f"\n{options.steps} steps; cache: {bytes_per_token:.0f} bytes a token on disk\n"
    write_text(workload.output / "cache.md", machine(options.threads) + "\n" + text)
    print(text)


if __name__ == "__main__":
    main()
