"""The demo: distil a chain from a real model, make and measure models of other sizes, write the report."""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

from cbd_trl.build.build import build_chain
from cbd_trl.cards import save_cards
from cbd_trl.chain.chain import Chain
from cbd_trl.demo.answers import answer
from cbd_trl.demo.clock import Clock, peak_memory, predict
from cbd_trl.demo.plan import SMOLLM2, Plan, training_args
from cbd_trl.demo.settings import settle
from cbd_trl.demo.source import HUB_ID, prepare_source
from cbd_trl.demo.summary import write_report
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.recipe.corpus import split
from cbd_trl.report.sweep import OPERATORS, fingerprint, sweep
from cbd_trl.report.tables import describe_shape, format_count
from cbd_trl.report.text import add_bits_per_byte, held_out_blocks
from cbd_trl.targets.from_chain import from_chain
from cbd_trl.utils.durations import format_seconds
from cbd_trl.utils.modeling import load_causal_lm
from cbd_trl.utils.progress import Progress
from cbd_trl.utils.progress_part import quiet_loading
from cbd_trl.utils.results import Results


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
        with quiet_loading():
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
        save_cards(chain, report)
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
