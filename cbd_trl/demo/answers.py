"""What a model says to a prompt."""

from typing import Any

import torch

from cbd_trl.generation.prompts import Prompts


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
