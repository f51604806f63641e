"""The independent reference: transformers on the same weights, in float32, greedy."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Greedy:
    """What the reference says of one prompt."""

    tokens: list[int]
    logprobs: list[float]
    """Of each token."""
    margins: list[float]
    """Best logit minus second best at each token."""


class Reference:
    """Generates one prompt at a time."""

    def __init__(self, model_dir: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def greedy(self, prompt: list[int], max_tokens: int) -> Greedy:
        """`max_tokens` tokens of `generate`, whatever they are: end-of-sequence tokens do not stop it."""
        self._model.generation_config.eos_token_id = None
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        tokens = out.sequences[0, len(prompt) :].tolist()
        logits = torch.cat(out.logits)
        best = logits.topk(2).values
        chosen = logits.log_softmax(-1)[range(len(tokens)), tokens]
        return Greedy(tokens, chosen.tolist(), (best[:, 0] - best[:, 1]).tolist())
