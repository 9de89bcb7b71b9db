"""What a model says to a prompt."""

from typing import Any

import torch

from cbd_trl.utils.blocks import prefix_ids


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
    start: list[int] = []
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    else:
        # A template writes what begins a text itself.
        text, start = prompt, prefix_ids(tokenizer)
    ids = torch.tensor([[*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return " ".join(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split())
