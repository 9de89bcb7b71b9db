"""The demo: distil a chain from a real model, make and measure models of other sizes, write the report."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.build.build import build_chain
from cbd_trl.chain.chain import Chain
from cbd_trl.chain.measurements import markdown_table, measures
from cbd_trl.demo.clock import Clock, peak_memory, predict
from cbd_trl.demo.plan import SMOLLM2, Plan, settle, training_args
from cbd_trl.demo.source import HUB_ID, prepare_source
from cbd_trl.generation.prompts import Prompts
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.recipe.corpus import split
from cbd_trl.report.measure import add_bits_per_byte, held_out_blocks
from cbd_trl.report.page import save_measurements
from cbd_trl.report.plots import plot_sweep
from cbd_trl.report.sweep import OPERATORS, fingerprint, sweep
from cbd_trl.report.tables import rich_table
from cbd_trl.targets.from_chain import from_chain
from cbd_trl.utils.files import Results, write_text
from cbd_trl.utils.formatting import format_count, format_seconds
from cbd_trl.utils.modeling import load_causal_lm, quiet
from cbd_trl.utils.progress import Progress


class Demo:
    """One run of the demo, in stages that each keep what they finish.

    Args:
        output: folder of everything that is written.
        wheel: wheel with the source's GGUF file; None takes it from the Hub.
        steps: optimiser steps per anchor; None for those of the run that is resumed, or what fits the machine.
        seed: likewise; None is 0 in a new run.
        plan: anchors and targets.
        console: where progress is shown.

    Raises:
        ValueError: if the folder holds a demo with other settings.
    """

    def __init__(
        self,
        output: Path | str = "demo-output",
        wheel: Path | str | None = None,
        steps: int | None = None,
        seed: int | None = None,
        plan: Plan = SMOLLM2,
        console: Console | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.output = Path(output)
        self.wheel = wheel
        self.plan = plan
        self.console = console or Console()
        self.results = Results(self.output / "results.json")
        self.settings = settle(self.results, self.output, plan, steps, seed)
        self.costs_before = self.results.get("costs") or {"seconds": 0.0, "peak_memory_gb": 0.0}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self) -> dict[str, Any]:
        """Run every stage, or what an earlier run left of it.

        Returns:
            what report.json holds.
        """
        with quiet(messages=True):
            return self._run()

    def _run(self) -> dict[str, Any]:
        folder = self._source()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.rows, held_out = split(self.tokenizer, self.plan.corpus_rows)
        self.blocks = held_out_blocks(self.tokenizer, held_out, self.plan.held_out_length, self.plan.held_out_blocks)
        self.clock = self._predict(folder)
        chain = self._build(folder)
        report = self._sweep(chain)
        answers = self._answers(chain, report)
        saved = self._save(chain, report)
        self.clock.stop()
        report |= {
            **self._costs(),
            "seconds_this_run": round(time.perf_counter() - self.started, 1),
            "source": HUB_ID,
            **vars(self.settings),
            "held_out_tokens": self.blocks.input_ids.numel(),
            "prompt": self.plan.prompt,
            "answers": answers,
            "model": saved.as_posix(),
        }
        write_report(self.output, report, self.console)
        return report

    def _stage(self, title: str, stage: str | None = None) -> None:
        """Announce a stage with its time, and that of everything left."""
        if stage is None:
            self.console.rule(f"[bold]{title}")
            return
        self.clock.start(stage)
        times = f"{format_seconds(self.clock.seconds(stage))} of {format_seconds(self.clock.left())} left"
        self.console.rule(f"[bold]{title}[/bold] (about {times})")

    def _source(self) -> Path:
        self._stage(f"The source: SmolLM2-135M-Instruct from {self.wheel or 'the Hub'}")
        return prepare_source(self.output / "source", self.wheel)

    def _evaluate(self, model: PreTrainedModel) -> float:
        return held_out_loss(_on(model, self.device), self.blocks)

    def _predict(self, folder: Path) -> Clock:
        """The clock, set by timing the source on the held-out tokens."""
        model = load_causal_lm(folder, role="model of the demo", dtype=torch.float32)
        size = model.num_parameters()
        known = self.results.get("speed")
        if known is None:
            started = time.perf_counter()
            with Progress("Measuring the source", total=1):
                loss = self._evaluate(model)
            known = self.blocks.input_ids.numel() / (time.perf_counter() - started)
            facts = f"{format_count(size)} parameters, held-out loss {loss:.3f} nats per token, {known:.0f} tokens/s."
            self.console.print(facts, highlight=False)
            self.results.put("speed", known)
        del model
        # Only for predictions, so the shares of the real plan serve for every plan.
        sizes = [size, int(0.63 * size), int(0.33 * size)]
        seconds = predict(
            sizes,
            targets=len(self.plan.targets),
            operators=len(OPERATORS) + 1,
            swap_probabilities=self.plan.swap_probabilities,
            speed=known,
            bf16=self.settings.bf16,
            steps=self.settings.steps,
            step_tokens=self.plan.batch_size * self.plan.max_length,
            calibration_tokens=self.plan.calibration_tokens,
            held_out_tokens=self.blocks.input_ids.numel(),
            answer_tokens=self.plan.answer_tokens,
        )
        for number in range(1, self._anchors_built() + 1):
            seconds[f"anchor {number}"] = 0.0
        for stage in ("sweep", "answers"):
            if self.results.get(f"{stage} done"):
                seconds[stage] = 0.0
        return Clock(seconds)

    def _anchors_built(self) -> int:
        """Lower anchors that an earlier run finished."""
        folder = self.output / "chain"
        if not (folder / "chain.json").exists():
            return 0
        return len(Chain.from_pretrained(folder, verify=False).anchors) - 1

    def _build(self, source: Path) -> Chain:
        """Build the chain, one anchor at a time, so that each has its own stage."""
        folder, plan, settings = self.output / "chain", self.plan, self.settings
        anchors: list[dict[str, Any]] = [
            {**fields, "args": training_args(plan, n, str(folder), settings.steps, settings.seed, settings.bf16)}
            for n, fields in enumerate(plan.anchors)
        ]
        built = self._anchors_built()
        for number in range(1, len(anchors) + 1):
            if number <= built < len(anchors):
                continue
            if number > built:
                shape = describe_shape(plan.anchors[number - 1])
                self._stage(f"Anchor {number} of {len(anchors)}: {shape}", f"anchor {number}")
            chain = build_chain(
                source,
                anchors if built == len(anchors) else anchors[:number],
                dataset=self.rows,
                output_dir=folder,
                args=anchors[0]["args"],
                processing_class=self.tokenizer,
                calibration_tokens=plan.calibration_tokens,
            )
            self._costs()
        return chain

    def _sweep(self, chain: Chain) -> dict[str, Any]:
        self._stage("Every size, every operator", "sweep")
        with Progress("measuring") as bar:
            report = sweep(
                chain,
                self.plan.targets,
                evaluate=self._evaluate,
                results=self.results,
                key=fingerprint(self.blocks.input_ids, self.blocks.labels),
                seed=self.settings.seed,
                on_step=bar.at,
            )
        for entry, anchor in zip(report["anchors"], chain.anchors, strict=True):
            entry["tokens_seen"] = anchor.tokens_seen
        add_bits_per_byte(report, self.tokenizer, self.blocks)
        save_measurements(chain, report)
        self.results.put("sweep done", True)
        self._costs()
        return report

    def _answers(self, chain: Chain, report: dict[str, Any]) -> list[dict[str, Any]]:
        self._stage("What they say", "answers")
        self.console.print(f"[bold]{self.plan.prompt}[/bold]")
        entries = sorted([*report["anchors"], *report["targets"]], key=lambda entry: -entry["num_parameters"])
        answers = []
        for entry in entries:
            files = [anchor.files for anchor in chain.anchors]
            key = fingerprint("answer", self.plan.prompt, self.plan.answer_tokens, entry["shape"], files)
            text = self.results.get(key)
            if text is None:
                # An anchor's own shape gives that anchor.
                model = _on(from_chain(chain, config=entry["shape"]), self.device)
                text = answer(model, self.tokenizer, self.plan.prompt, self.plan.answer_tokens)
                self.results.put(key, text)
            kind = "anchor" if "name" in entry else "target"
            self.console.print(f"[cyan]{format_count(entry['num_parameters'])}[/cyan] ({kind}): ", end="")
            self.console.print(text, markup=False, highlight=False)
            answers.append({"num_parameters": entry["num_parameters"], "kind": kind, "answer": text})
        self.results.put("answers done", True)
        return answers

    def _save(self, chain: Chain, report: dict[str, Any]) -> Path:
        """One target as a normal model folder."""
        entry = report["targets"][self.plan.saved]
        folder = self.output / f"model-{format_count(entry['num_parameters'])}"
        key = fingerprint("saved", entry["shape"], [anchor.files for anchor in chain.anchors])
        if self.results.get("saved") != key or not (folder / "config.json").exists():
            from_chain(chain, config=entry["shape"], save_directory=folder)
            self.results.put("saved", key)
        return folder

    def _costs(self) -> dict[str, float]:
        """Seconds, and the most memory in GB, of this run and the earlier ones that it resumes; kept for the next."""
        costs = {
            "seconds": round(self.costs_before["seconds"] + time.perf_counter() - self.started, 1),
            "peak_memory_gb": round(max(self.costs_before["peak_memory_gb"], peak_memory()), 2),
        }
        self.results.put("costs", costs)
        return costs


def _on(model: Any, device: torch.device) -> PreTrainedModel:
    # Any: the type checker does not see through the decorator of PreTrainedModel.to.
    return model.to(device)


TITLE = "Any size from one chain: SmolLM2-135M-Instruct and two anchors distilled from it"


def findings(report: Mapping[str, Any]) -> list[str]:
    """What the numbers say, one sentence each.

    Args:
        report: what report.json holds.
    """
    losses = [target["loss"] for target in report["targets"]]
    ahead = sum(loss["nested"] < min(loss["linear"], loss["random"]) for loss in losses)
    source, *lower = sorted(report["anchors"], key=lambda anchor: -anchor["num_parameters"])
    gap = max(anchor["loss"] - source["loss"] for anchor in lower)
    return [
        f"nested is ahead of linear and of random at {ahead} of {len(losses)} sizes.",
        f"The anchors' held-out loss is within {gap:.2f} nats of the source's ({source['loss']:.2f}).",
    ]


def costs(report: Mapping[str, Any]) -> str:
    """What the run took, in one sentence.

    Args:
        report: what report.json holds.
    """
    kept = report["seconds"] - report["seconds_this_run"]
    earlier = f" ({format_seconds(kept)} of it in earlier runs)" if kept >= 1 else ""
    precision = "bf16 mixed precision" if report["bf16"] else "float32"
    tokens = max(anchor["tokens_seen"] for anchor in report["anchors"])
    return (
        f"{report['steps']} steps (about {round(tokens, -3):,} tokens) per anchor in {precision}; "
        f"{format_seconds(report['seconds'])}{earlier}, at most {report['peak_memory_gb']:.1f} GB of memory."
    )


def markdown(report: Mapping[str, Any]) -> str:
    """report.md.

    Args:
        report: what report.json holds.
    """
    answers = [
        f"- **{format_count(entry['num_parameters'])}** ({entry['kind']}): {_escape(entry['answer'])}"
        for entry in report["answers"]
    ]
    parts = [
        f"# {TITLE}",
        "![held-out loss against the number of parameters](loss.png)",
        f"{measures(report)}; on {report['held_out_tokens']} tokens that no anchor saw. Seconds to build the model "
        "with nested. No target was trained.",
        markdown_table(report),
        "\n".join(f"- {line}" for line in findings(report)) + f"\n- {costs(report)}",
        f"## What they say\n\n> {report['prompt']}",
        "\n".join(answers),
        f"## Use one\n\n`{report['model']}` is a normal model folder:",
        f"```python\n{_usage(report['model'])}\n```",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def write_report(output: Path, report: Mapping[str, Any], console: Console) -> None:
    """Write report.json, report.md, loss.png and loss.svg, and show the table.

    Args:
        output: the demo's folder.
        report: what report.json is to hold.
        console: where the table is shown.
    """
    write_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(output / "report.md", markdown(report))
    pictures = plot_sweep(report, output / "loss", title=TITLE)
    console.rule("[bold]Results")
    console.print(rich_table(report))
    for line in [*findings(report), costs(report)]:
        console.print(line, highlight=False)
    files = ", ".join(str(path) for path in [output / "report.json", output / "report.md", *pictures])
    console.print(f"Written: {files}", soft_wrap=True, highlight=False)
    console.print(
        f"The chain: {output / 'chain'}. Another size from it takes seconds:", soft_wrap=True, highlight=False
    )
    command = f"cbd-trl init {output / 'chain'} --num-parameters 100e6 --output my-100M"
    console.print(f"  {command}", soft_wrap=True, highlight=False)
    console.print(f"A normal model folder: {report['model']}", soft_wrap=True, highlight=False)
    for line in _usage(report["model"]).splitlines():
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)


def _usage(model: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, pipeline\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model}")\n'
        f'pipeline("text-generation", model="{model}")("Once upon a time")'
    )


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in text)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer.

    Args:
        model: a causal language model.
        tokenizer: with a chat template the prompt is a user's turn, without one the text to go on from.
        prompt: the question.
        max_new_tokens: the most tokens of the answer.

    Returns:
        the answer on one line, special tokens left out.
    """
    turns = [{"role": "user", "content": prompt}]
    row = {"prompt": turns if getattr(tokenizer, "chat_template", None) else prompt}
    ids = torch.tensor([Prompts([row], tokenizer)[0].ids], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return " ".join(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split())
