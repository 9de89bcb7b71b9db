"""Anchors that were trained apart: what lies between them, aligned and not.

    python -m benchmarks.align_trained_apart --output runs/align

Small models of two families, each trained from a seed of its own on the text the package ships (tokens of a BPE of
1024 made from it), and then put into chains of two as they are and aligned. Held-out loss of targets between them, in
nats per token, beside the straight line between the two anchors' losses. Run again, it goes on where it stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.tables import machine, markdown
from cbd_trl import Chain, chain_from_anchors, from_chain
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.losses.reduction import cross_entropy
from cbd_trl.recipe.corpus import split
from cbd_trl.report.measure import held_out_blocks
from cbd_trl.utils.blocks import TokenBlocks, token_blocks
from cbd_trl.utils.files import Results, write_text

VOCABULARY, LENGTH, ROWS, LEARNING_RATE = 1024, 96, 8, 3e-3
# Layers, width, heads, FFN width; a head has 16 coordinates.
SHAPES = {"upper": (6, 160, 10, 448), "width": (6, 96, 6, 256), "depth": (4, 160, 10, 448), "both": (4, 96, 6, 256)}
FAMILIES = ("llama", "gpt2")
SHARES = (0.25, 0.5, 0.75)
OPERATORS = ("nested", "linear")


def make_tokenizer(output: Path) -> Any:
    """A byte-level BPE of the shipped text."""
    folder = output / "tokenizer"
    if not folder.exists():
        texts, _ = split(None)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        special = ["<end>"]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(texts["text"], trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def make_model(family: str, shape: Sequence[int]) -> PreTrainedModel:
    """A fresh model with a tied head."""
    layers, width, heads, ffn = shape
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_layer=layers,
                n_embd=width,
                n_head=heads,
                n_inner=ffn,
                n_positions=LENGTH,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=16,
            intermediate_size=ffn,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def trained(folder: Path, family: str, role: str, blocks: Tensor, steps: int) -> PreTrainedModel:
    """A model trained from its own seed on blocks (N, T), or that of an earlier run."""
    if not folder.exists():
        seed = 1 + list(SHAPES).index(role)
        torch.manual_seed(seed)
        model: Any = make_model(family, SHAPES[role]).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.05)
        for _ in tqdm(range(steps), desc=f"Training {family} {role}", leave=False):
            batch = blocks[torch.randint(len(blocks), (ROWS,))]
            logits = model(input_ids=batch).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def _loss(model: PreTrainedModel, held_out: TokenBlocks) -> float:
    return held_out_loss(model, held_out)


def measure(chain: Chain, held_out: TokenBlocks) -> dict[str, Any]:
    """Losses of the anchors and of the targets of each operator at three sizes, or as many as the pair has."""
    upper, lower = chain.anchors
    large, small = upper.num_parameters, lower.num_parameters
    ends = [_loss(anchor.load_model(), held_out) for anchor in (upper, lower)]
    targets: dict[str, dict[str, float]] = {}
    for share in SHARES:
        # A pair that differs in depth alone has few sizes; both operators get the shape of the first.
        shape = from_chain(chain, small + share * (large - small), tolerance=0.1).config.cbd_trl["shape"]
        if shape in (upper.shape, lower.shape):
            continue
        made = {name: from_chain(chain, config=shape, operator=name) for name in OPERATORS}
        losses = {name: _loss(model, held_out) for name, model in made.items()}
        targets[str(made[OPERATORS[0]].num_parameters())] = losses
    return {"ends": ends, "sizes": [large, small], "match": lower.training["match"], "targets": targets}


def table(results: dict[str, Any]) -> str:
    """Every target, aligned beside unaligned."""
    lines = []
    for pair, (aligned, apart) in results.items():
        (high, low), sizes = aligned["ends"], aligned["sizes"]
        for size in aligned["targets"]:
            line = low + (int(size) - sizes[1]) / (sizes[0] - sizes[1]) * (high - low)
            cells = [f"{one['targets'][size][name]:.2f}" for name in OPERATORS for one in (apart, aligned)]
            lines.append([f"{pair}, {int(size) / 1e6:.2f}M", f"{line:.2f}", *cells])
    header = ["target", "straight line", *(f"`{name}`, {kind}" for name in OPERATORS for kind in ("apart", "aligned"))]
    matches = [
        [pair, *(f"{quality['matched']:.2f} ({quality['random']:.2f})" for quality in aligned["match"].values())]
        for pair, (aligned, _) in results.items()
    ]
    return (
        markdown(header, lines)
        + "\n"
        + markdown(["match (of a random one)", *next(iter(results.values()))[0]["match"]], matches)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="of training, for each model")
    arguments = parser.parse_args()
    output = arguments.output
    tokenizer = make_tokenizer(output)
    training, texts = split(tokenizer)
    blocks = token_blocks(training, tokenizer, 10**7, LENGTH).input_ids
    held_out = held_out_blocks(tokenizer, texts, LENGTH, 128)
    results = Results(output / "results.json")
    found = {}
    for family in FAMILIES:
        anchors = {
            role: trained(output / family / f"{role}-model", family, role, blocks, arguments.steps) for role in SHAPES
        }
        for pair in ("width", "depth", "both"):
            key = f"{family}, {pair}"
            if results.get(key) is None:
                models, folder = [anchors["upper"], anchors[pair]], output / family / pair
                options = {"dataset": training, "processing_class": tokenizer}
                chains = [
                    chain_from_anchors(models, output_dir=folder / name, align=name == "aligned", **options)
                    for name in ("aligned", "apart")
                ]
                results.put(key, [measure(chain, held_out) for chain in chains])
            found[key] = results.get(key)
    write_text(output / "table.md", machine(torch.get_num_threads()) + "\n" + table(found))
    print((output / "table.md").read_text())


if __name__ == "__main__":
    main()
