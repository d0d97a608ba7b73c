"""What the model says, before and after training."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.support.encoding import IGNORED

_MAX_NEW_TOKENS = 40
# Of a plain text, which has no prompt, this share is given and the rest is to be written.
_GIVEN_SHARE = 0.25


def choose_prompts(encoded: Dataset, count: int) -> list[list[int]]:
    """Return the tokens before the first target of `count` records, spread evenly over the dataset."""
    count = min(count, len(encoded))
    return [_prompt_of(encoded[index * len(encoded) // count]) for index in range(count)]


def complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> list[str]:
    """Complete each prompt greedily, so that the same weights always say the same."""
    was_training = model.training
    model.eval()
    completions = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            completions.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip())
    model.train(was_training)
    return completions


def _prompt_of(row: dict[str, list[int]]) -> list[int]:
    first_target = next(index for index, label in enumerate(row["labels"]) if label != IGNORED)
    # At least one token must be given.
    given = first_target if first_target > 1 else max(1, int(len(row["input_ids"]) * _GIVEN_SHARE))
    return row["input_ids"][:given]
