"""Memory of the loss against the size of the vocabulary.

    python -m benchmarks.distill_memory --output runs/memory

Two random models of 2 layers and width 128, whose bodies take little, and one batch of B x T = 4 x 512 tokens, all of
them scored: the highest resident size during one loss and its backward pass, less the size before it and less the
student's gradients. `DistillTrainer` against its dense twin: all logits of both models, written out below. Every
measurement in a process of its own; the dense twin stops where its buffers of B x T x V float32 would not fit.
"""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.memory import PeakSampler, resident_bytes
from benchmarks.random_models import two_token_tokenizer
from benchmarks.tables import gigabytes, machine, markdown
from benchmarks.workload import environment
from cbd_trl import DistillConfig, DistillTrainer
from cbd_trl.utils.files import Results, write_text

VOCABULARIES = (8_000, 32_000, 128_000, 256_000)
ROWS, LENGTH = 4, 512
KD_WEIGHT, CE_WEIGHT = 1.0, 0.5


def make_model(vocabulary: int, seed: int) -> PreTrainedModel:
    """A Llama of 2 layers and width 128, random weights, tied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_trainer(vocabulary: int, output: Path) -> DistillTrainer:
    """A trainer of which only the loss is used."""
    arguments = DistillConfig(
        output_dir=str(output / "trainer"),
        kd_weight=KD_WEIGHT,
        ce_weight=CE_WEIGHT,
        max_length=LENGTH,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": [[1, 1, 1]]})
    student, teacher = make_model(vocabulary, 0), make_model(vocabulary, 1)
    return DistillTrainer(student, teacher, arguments, rows, processing_class=two_token_tokenizer())


def fused_loss(trainer: DistillTrainer, batch: dict[str, Tensor]) -> Tensor:
    """The trainer's own loss: mean nats per scored token."""
    return trainer.compute_loss(trainer.model, dict(batch))


def dense_loss(trainer: DistillTrainer, batch: dict[str, Tensor]) -> Tensor:
    """The same number from all logits of both models."""
    inputs: Any = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    teacher: Any = trainer.teacher_model
    with torch.no_grad():
        teacher_log = F.log_softmax(teacher(**inputs).logits[:, :-1], -1)
    student_log = F.log_softmax(trainer.model(**inputs).logits[:, :-1], -1)
    kl = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1).mean()
    ce = F.nll_loss(student_log.flatten(0, 1), batch["labels"][:, 1:].flatten())
    return KD_WEIGHT * kl + CE_WEIGHT * ce


LOSSES = {"fused": fused_loss, "dense": dense_loss}


def make_batch(vocabulary: int, length: int) -> dict[str, Tensor]:
    """Random tokens, all scored."""
    ids = torch.randint(2, vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def measure(name: str, vocabulary: int, output: Path) -> dict[str, float]:
    """Peak of one loss and its backward pass in this process.

    Returns:
        peak_bytes, and the loss in nats, by which the two can be compared.
    """
    trainer = make_trainer(vocabulary, output)
    student: Any = trainer.model.train()
    # A short batch first, so that what is set up once is there before the measurement.
    LOSSES[name](trainer, make_batch(vocabulary, 2)).backward()
    student.zero_grad()
    gc.collect()
    before = resident_bytes()
    sampler = PeakSampler()
    sampler.start()
    loss = LOSSES[name](trainer, make_batch(vocabulary, LENGTH))
    loss.backward()
    gradients = sum(p.grad.numel() * 4 for p in student.parameters())
    return {"peak_bytes": sampler.stop() - before - gradients, "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, kept between runs")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--dense-up-to", type=int, default=128_000, help="largest vocabulary of the dense twin")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=list(LOSSES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    output: Path = options.output.resolve()
    torch.set_num_threads(options.threads)
    if options.child:
        write_text(output / "child.json", json.dumps(measure(options.child, options.vocabularies[0], output)))
        return

    results = Results(output / "memory.json")
    lines = []
    for vocabulary in options.vocabularies:
        cells = [f"{vocabulary:,}", gigabytes(ROWS * LENGTH * vocabulary * 4)]
        for name in LOSSES:
            place = f"{name} V={vocabulary} threads={options.threads}"
            if name == "dense" and vocabulary > options.dense_up_to:
                cells += ["not run", ""]
                continue
            if results.get(place) is None:
                command = [sys.executable, "-m", "benchmarks.distill_memory", "--output", str(output), "--child", name]
                command += ["--vocabularies", str(vocabulary), "--threads", str(options.threads)]
                subprocess.run(command, check=True, env=environment(options.threads))
                results.put(place, json.loads((output / "child.json").read_text(encoding="utf-8")))
            found = results.get(place)
            cells += [gigabytes(found["peak_bytes"]), f"{found['loss']:.5f}"]
        print(cells, flush=True)
        lines.append(cells)
    text = markdown(["V", "B x T x V x 4, GB", "fused, GB", "its loss", "dense, GB", "its loss"], lines)
    write_text(output / "memory.md", machine(options.threads) + "\n" + text)
    print(text)


if __name__ == "__main__":
    main()
