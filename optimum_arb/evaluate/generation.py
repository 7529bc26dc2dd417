"""What models write on the same prompts, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .perplexity import input_device

PROMPTS = ("The capital of France is", "The most important thing about water is that")


def check_chat(tokenizer: Any, chat: bool) -> None:
    """Raises ValueError where a chat template is wanted and the tokenizer has none."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("The model's tokenizer has no chat template: generate without it.")


def sample(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str] = PROMPTS, new_tokens: int = 48, chat: bool = False
) -> list[dict[str, str]]:
    """The greedy continuation of each prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: texts.
        new_tokens: at most so many.
        chat: put each prompt into the tokenizer's chat template, as a user's message.

    Returns:
        `prompt` and `text`, what came after it.

    Raises:
        ValueError: `chat`, and the tokenizer has no chat template.
    """
    check_chat(tokenizer, chat)
    found = []
    for prompt in prompts:
        given = prompt
        if chat:
            messages = [{"role": "user", "content": prompt}]
            given = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(given, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
        ids = ids.to(input_device(model))
        pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        with torch.no_grad():
            out: Any = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
            )
        found.append({"prompt": prompt, "text": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)})
    return found
