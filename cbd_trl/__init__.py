"""Chain-based distillation: distill a language model into a chain of anchors, then make models of any size from it.

The public names load on first use, because torch and transformers take seconds to import and `cbd-trl --help` needs
neither.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbd_trl.build.bridge_step import BridgeStep
    from cbd_trl.build.build import build_chain
    from cbd_trl.build.consolidate import consolidate_chain
    from cbd_trl.build.from_anchors import chain_from_anchors
    from cbd_trl.chain.chain import Chain
    from cbd_trl.targets.from_chain import from_chain
    from cbd_trl.targets.many import describe_targets, make_targets
    from cbd_trl.trainers.bridge_config import BridgeDistillConfig
    from cbd_trl.trainers.bridge_trainer import BridgeDistillTrainer
    from cbd_trl.trainers.distill_config import DistillConfig
    from cbd_trl.trainers.distill_trainer import DistillTrainer

__all__ = [
    "BridgeDistillConfig",
    "BridgeDistillTrainer",
    "BridgeStep",
    "Chain",
    "DistillConfig",
    "DistillTrainer",
    "build_chain",
    "chain_from_anchors",
    "consolidate_chain",
    "describe_targets",
    "from_chain",
    "make_targets",
]

__version__ = "0.1.0"

_HOMES = {
    "BridgeDistillConfig": "cbd_trl.trainers.bridge_config",
    "BridgeDistillTrainer": "cbd_trl.trainers.bridge_trainer",
    "BridgeStep": "cbd_trl.build.bridge_step",
    "Chain": "cbd_trl.chain.chain",
    "DistillConfig": "cbd_trl.trainers.distill_config",
    "DistillTrainer": "cbd_trl.trainers.distill_trainer",
    "build_chain": "cbd_trl.build.build",
    "chain_from_anchors": "cbd_trl.build.from_anchors",
    "consolidate_chain": "cbd_trl.build.consolidate",
    "describe_targets": "cbd_trl.targets.many",
    "from_chain": "cbd_trl.targets.from_chain",
    "make_targets": "cbd_trl.targets.many",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use.

    Args:
        name: one of `__all__`.

    Raises:
        AttributeError: for any other name; the message lists those that exist.
    """
    if name not in _HOMES:
        raise AttributeError(
            f"module 'cbd_trl' has no attribute '{name}': its public names are {', '.join(__all__)}. Everything else "
            "is imported from the module that holds it, such as cbd_trl.losses.divergences."
        )
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
