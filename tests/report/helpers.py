"""What `measure_chains` returns, made up: a chain of three anchors with sizes between, and scores of a task."""

from typing import Any

_DEPTHS = (30, 16, 16)
_WIDTHS = (576, 576, 384)
_SIZES = (134_515_008, 84_942_144, 44_205_696)
_LOSSES = (2.684, 3.012, 3.391)
OPERATORS = {"nested": 0.0, "linear": 0.9, "slice": 0.35, "expand": 0.28, "random": 7.6}


def _shape(depth: int, width: int) -> dict[str, int]:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 192}
    return {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": width * 8 // 3, **heads}


def _score(loss: float) -> dict[str, Any]:
    score = {"metric": "acc_norm", "value": 0.62 - 0.09 * loss, "stderr": 0.011, "higher_is_better": True}
    return {**score, "examples": 2000, "all": {}}


def made_up(name: str = "my-chain", worse: float = 0.0, tokenizer: str = "a", task: str | None = None) -> Any:
    """A chain as it could have been measured, SmolLM2's sizes.

    Args:
        name: of the chain.
        worse: nats by which all but the source is worse.
        tokenizer: its hash.
        task: one with scores.
    """
    report: dict[str, Any] = {"name": name, "path": f"chains/{name}", "revision": None, "model_type": "llama"}
    report |= {"tokenizer": tokenizer, "anchors": [], "targets": []}
    report["text"] = {"blocks": 64, "block_length": 256, "start": [], "tokens": 16320, "bytes": 61_000}

    def found(loss: float) -> dict[str, Any]:
        return {} if task is None else {task: _score(loss)}

    def bits(loss: float) -> float:
        return loss * 16320 / (0.6931 * 61_000)

    for number, loss in enumerate(_LOSSES):
        loss += worse * (number > 0)
        entry = {"num_parameters": _SIZES[number], "shape": _shape(_DEPTHS[number], _WIDTHS[number]), "loss": loss}
        entry |= {"name": f"{_SIZES[number] / 1e6:.0f}M", "seconds": 0.3, "tokens_seen": 2_000_000 * (number > 0)}
        report["anchors"].append({**entry, "bits_per_byte": bits(loss), "probes": found(loss)})
    for pair in range(2):
        for share in (0.25, 0.5, 0.75):
            size = _SIZES[pair] + share * (_SIZES[pair + 1] - _SIZES[pair])
            depth = round(_DEPTHS[pair] + share * (_DEPTHS[pair + 1] - _DEPTHS[pair]))
            on_line = _LOSSES[pair] + share * (_LOSSES[pair + 1] - _LOSSES[pair]) - 0.02 + worse * (pair + share > 0)
            losses = {operator: on_line + above for operator, above in OPERATORS.items()}
            if pair == 0:
                losses["patch"] = losses["nested"]
            report["targets"].append(
                {
                    "num_parameters": int(size),
                    "shape": _shape(depth, _WIDTHS[pair] - 96 * pair),
                    "seconds": 0.4,
                    "seconds_by_operator": dict.fromkeys(losses, 0.4),
                    "loss": losses,
                    "bits_per_byte": {operator: bits(loss) for operator, loss in losses.items()},
                    "probes": {operator: found(loss) for operator, loss in losses.items()},
                }
            )
    return report


def made_up_report(*chains: Any, data: str = "held-out.jsonl") -> dict[str, Any]:
    """What report.json holds.

    Args:
        chains: of `made_up`.
        data: name of the text.
    """
    tasks = list(chains[0]["anchors"][0]["probes"])
    return {"version": "0.1.0", "versions": {"lm-eval": "0.4.13"}, "data": data, "tasks": tasks, "chains": chains}
