"""The demo: the recipe `demo` built and measured, then what it prints: answers, a table, a picture."""

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console

from cbd_trl.chain.chain import Chain
from cbd_trl.chain.measurements import MEASURED, measurements_table, table_units
from cbd_trl.demo.source import HUB_ID, prepare_source
from cbd_trl.generation.prompts import Prompts
from cbd_trl.recipe.check import check_recipe, recipe_table
from cbd_trl.recipe.estimate import bf16_pays, writing_seconds
from cbd_trl.recipe.run import build_checked
from cbd_trl.recipe.schema import read_recipe
from cbd_trl.report.plots import plot_sweep
from cbd_trl.report.sweep import fingerprint
from cbd_trl.report.tables import sweep_table
from cbd_trl.targets.from_chain import from_chain
from cbd_trl.utils.files import Results, write_text
from cbd_trl.utils.formatting import format_count, format_seconds
from cbd_trl.utils.modeling import quiet
from cbd_trl.utils.progress import make_console

TITLE = "Any size from one chain: SmolLM2-135M-Instruct and two anchors distilled from it"
PROMPT = "Give me three tips for a good night's sleep."
ANSWER_TOKENS = 40
# The target that is saved as a model folder, counted from the smallest.
SAVED = -2


@dataclass(frozen=True)
class Settings:
    """What the results of a demo depend on, besides its recipe.

    Args:
        steps: optimizer steps per anchor.
        seed: of the distillation and of the random models.
        bf16: whether the anchors are distilled in mixed precision.
    """

    steps: int
    seed: int
    bf16: bool

    def changes(self, source: Path, chain: Path) -> list[str]:
        """List what they change of the recipe, as `read_recipe` takes it.

        Args:
            source: folder of the source.
            chain: folder of the chain.
        """
        args = {
            "max_steps": self.steps,
            "warmup_steps": min(10, self.steps // 2),
            "logging_steps": max(1, min(10, self.steps // 3)),
            "save_steps": max(10, -(-self.steps // 3)),
            "bf16": self.bf16,
            "seed": self.seed,
        }
        values = {"source": str(source), "output_dir": str(chain)} | {f"args.{key}": args[key] for key in args}
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def default_steps(bf16: bool) -> int:
    """Choose optimizer steps per anchor that keep the demo within its minutes on two cores.

    Args:
        bf16: whether training runs in bf16 mixed precision.
    """
    return 70 if bf16 else 32


class Demo:
    """One run of the demo, in stages that each keep what they finish.

    Args:
        output: folder of everything that is written.
        wheel: wheel with the source's GGUF file; None takes it from the Hub.
        steps: optimizer steps per anchor; None for those of the run that is resumed, or what fits the machine.
        seed: likewise; None is 0 in a new run.
        recipe: name or file of the recipe.
        console: where progress is shown.

    Raises:
        ValueError: for less than one step, or if the folder holds a demo with other settings.
    """

    def __init__(
        self,
        output: Path | str = "demo-output",
        wheel: Path | str | None = None,
        steps: int | None = None,
        seed: int | None = None,
        recipe: Path | str = "demo",
        console: Console | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.output = Path(output)
        self.wheel = wheel
        self.recipe = recipe
        self.console = console or make_console()
        self.results = Results(self.output / "results.json")
        self.settings = self._settle(steps, seed)
        self.costs_before = self.results.get("costs") or {"seconds": 0.0, "peak_memory_gb": 0.0}
        self.device = PartialState().device

    def run(self) -> dict[str, Any]:
        """Run every stage, or what an earlier run left of it.

        Returns:
            the content of report.json.
        """
        with quiet(messages=True):
            chain = self._build(self._source())
            report = json.loads((chain.path / MEASURED).read_text(encoding="utf-8"))
            answers = self._answers(chain, report)
            saved = self._save(chain, report)
        self.clock.stop()
        assert self.check.recipe.evaluation is not None
        report |= {
            **self._costs(),
            "seconds_this_run": round(time.perf_counter() - self.started, 1),
            "source": HUB_ID,
            **vars(self.settings),
            "held_out_tokens": self.check.recipe.evaluation.tokens,
            "prompt": PROMPT,
            "answers": answers,
            "model": saved.as_posix(),
        }
        write_report(self.output, report, self.console)
        return report

    def _settle(self, steps: int | None, seed: int | None) -> Settings:
        """Read the settings of the demo in the folder, or choose and keep those of a new one."""
        if steps is not None and steps < 1:
            raise ValueError(f"--steps {steps}: an anchor needs at least one step of distillation. Give 1 or more.")
        recipe = fingerprint(read_recipe(self.recipe).model_dump(exclude={"name", "lines", "problems"}))
        known = self.results.get("settings")
        if known is None:
            bf16 = bf16_pays()
            settings = Settings(default_steps(bf16) if steps is None else steps, seed or 0, bf16)
            self.results.put("settings", {**vars(settings), "recipe": recipe})
            return settings
        settings = Settings(known["steps"], known["seed"], known["bf16"])
        requested = {"--steps": (steps, settings.steps), "--seed": (seed, settings.seed)}
        changed = [f"{flag} {new} (there: {old})" for flag, (new, old) in requested.items() if new not in (None, old)]
        if known.get("recipe") != recipe:
            changed.append("another recipe")
        if changed:
            raise ValueError(
                f"{self.output} holds a demo with other settings than {', '.join(changed)}, and a chain is not built "
                "anew over another one. Choose another --output, or delete that folder."
            )
        return settings

    def _stage(self, title: str, stage: str) -> None:
        """Announce a stage with its time, and that of everything left."""
        self.clock.start(stage)
        times = f"{format_seconds(self.clock.seconds(stage))} of {format_seconds(self.clock.left())} left"
        self.console.rule(f"[bold]{title}[/bold] (about {times})")

    def _source(self) -> Path:
        self.console.rule(f"[bold]The source: SmolLM2-135M-Instruct from {self.wheel or 'the Hub'}")
        return prepare_source(self.output / "source", self.wheel)

    def _build(self, source: Path) -> Chain:
        """Build and measure the chain of the recipe."""
        changes = self.settings.changes(source, self.output / "chain")
        self.check = check_recipe(read_recipe(self.recipe, changes))
        self.console.print(recipe_table(self.check))
        done = self.results.get
        self.clock = Clock(
            {
                "anchors": sum(cost.seconds or 0.0 for cost in self.check.costs[self.check.finished :]),
                "evaluation": 0.0 if done("evaluation done") else self.check.measuring or 0.0,
                "answers": 0.0 if done("answers done") else self._writing(),
            }
        )
        titles = {"anchors": "The chain, anchor by anchor", "evaluation": "Every size, every operator"}

        def on_stage(stage: str) -> None:
            self._stage(titles[stage], stage)
            self._costs()

        chain = build_checked(self.check, on_stage)
        self.results.put("evaluation done", True)
        self._costs()
        return chain

    def _writing(self) -> float:
        """Predict the seconds of all answers."""
        if self.check.speed is None:
            return 0.0
        return writing_seconds(self.check.model_weights(), ANSWER_TOKENS, self.check.speed)

    def _answers(self, chain: Chain, report: dict[str, Any]) -> list[dict[str, Any]]:
        self._stage("Answers", "answers")
        self.console.print(f"[bold]{PROMPT}[/bold]")
        entries = sorted([*report["anchors"], *report["targets"]], key=lambda entry: -entry["num_parameters"])
        answers, tokenizer = [], chain.tokenizer()
        for entry in entries:
            files = [anchor.files for anchor in chain.anchors]
            key = fingerprint("answer", PROMPT, ANSWER_TOKENS, entry["shape"], files)
            text = self.results.get(key)
            if text is None:
                # An anchor's own shape gives that anchor.
                # Any: the type checker does not see through the decorator of PreTrainedModel.to.
                model: Any = from_chain(chain, config=entry["shape"])
                text = answer(model.to(self.device), tokenizer, PROMPT, ANSWER_TOKENS)
                self.results.put(key, text)
            kind = "anchor" if "name" in entry else "target"
            self.console.print(f"[cyan]{format_count(entry['num_parameters'])}[/cyan] ({kind}): ", end="")
            self.console.print(text, markup=False, highlight=False)
            answers.append({"num_parameters": entry["num_parameters"], "kind": kind, "answer": text})
        self.results.put("answers done", True)
        return answers

    def _save(self, chain: Chain, report: dict[str, Any]) -> Path:
        """Save one target as a normal model folder."""
        entry = report["targets"][SAVED]
        folder = self.output / f"model-{format_count(entry['num_parameters'])}"
        key = fingerprint("saved", entry["shape"], [anchor.files for anchor in chain.anchors])
        if self.results.get("saved") != key or not (folder / "config.json").exists():
            from_chain(chain, config=entry["shape"], save_directory=folder)
            self.results.put("saved", key)
        return folder

    def _costs(self) -> dict[str, float]:
        """Keep the seconds, and the most memory in GB, of this run and the earlier ones that it resumes."""
        costs = {
            "seconds": round(self.costs_before["seconds"] + time.perf_counter() - self.started, 1),
            "peak_memory_gb": round(max(self.costs_before["peak_memory_gb"], peak_memory()), 2),
        }
        self.results.put("costs", costs)
        return costs


class Clock:
    """Predicts the time left of a run of known stages.

    Args:
        seconds: stage -> predicted seconds, in order; 0 for one that has nothing left to do.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._predicted = dict(seconds)
        self._actual: dict[str, float] = {}
        self._running: tuple[str, float] | None = None

    def start(self, stage: str) -> None:
        """End the stage that runs, if any, and begin another.

        Args:
            stage: one of those predicted.
        """
        self.stop()
        self._running = (stage, time.perf_counter())

    def stop(self) -> None:
        """End the stage that runs, if any."""
        if self._running is not None:
            stage, started = self._running
            self._actual[stage] = time.perf_counter() - started
            self._running = None

    def seconds(self, stage: str) -> float:
        """Predict the seconds of a stage, corrected by how the finished stages compare with their predictions."""
        predicted = sum(self._predicted[name] for name in self._actual)
        actual = sum(self._actual.values())
        return self._predicted[stage] * (actual / predicted if predicted > 1 else 1.0)

    def left(self) -> float:
        """Predict the seconds of everything that is not finished, the running stage counted whole."""
        return sum(self.seconds(stage) for stage in self._predicted if stage not in self._actual)


def peak_memory() -> float:
    """Read the most memory that this process has held, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def findings(report: Mapping[str, Any]) -> list[str]:
    """Say what the numbers mean, one sentence each.

    Args:
        report: the content of report.json.
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
    """Say what the run took, in one sentence.

    Args:
        report: the content of report.json.
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
    """Write the text of report.md.

    Args:
        report: the content of report.json.
    """
    answers = [
        f"- **{format_count(entry['num_parameters'])}** ({entry['kind']}): {_escape(entry['answer'])}"
        for entry in report["answers"]
    ]
    parts = [
        f"# {TITLE}",
        "![held-out loss against the number of parameters](loss.png)",
        f"{table_units(report)}; on {report['held_out_tokens']} tokens that no anchor saw. Seconds to build the model "
        "with nested. No target was trained.",
        measurements_table(report),
        "\n".join(f"- {line}" for line in findings(report)) + f"\n- {costs(report)}",
        f"## Answers\n\n> {report['prompt']}",
        "\n".join(answers),
        f"## Use one\n\n`{report['model']}` is a normal model folder:",
        f"```python\n{_usage(report['model'])}\n```",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def write_report(output: Path, report: Mapping[str, Any], console: Console) -> None:
    """Write report.json, report.md, loss.png and loss.svg, and show the table.

    Args:
        output: the demo's folder.
        report: the content of report.json.
        console: where the table is shown.
    """
    write_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(output / "report.md", markdown(report))
    pictures = plot_sweep(report, output / "loss", title=TITLE)
    console.rule("[bold]Results")
    console.print(sweep_table(report))
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
    """Write a model's greedy answer.

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
