"""The independent reference: transformers on the same weights, greedy."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from baton.kernels import vector_math


@dataclass(frozen=True)
class Greedy:
    """What the reference says of one prompt."""

    tokens: list[int]
    logprobs: list[float]
    """Of each token."""
    margins: list[float]
    """Best logit minus second best at each token."""


class Reference:
    """A model of transformers, in float32 on the CPU unless told otherwise."""

    def __init__(
        self, model_dir: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, attention: str = "sdpa"
    ) -> None:
        vector_math.settle()
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation=attention)
        self._model = model.eval().to(device)
        self._device = device

    def logits(self, prompt: list[int], output: list[int]) -> torch.Tensor:
        """What it would choose each token of `output` from: float32 [len(output), vocab]."""
        ids = torch.tensor([prompt + output], device=self._device)
        with torch.inference_mode():
            return self._model(ids, logits_to_keep=len(output) + 1).logits[0, :-1].float()

    def hidden(self, prompt: list[int]) -> torch.Tensor:
        """After the last norm: float32 [len(prompt), hidden_size]."""
        ids = torch.tensor([prompt], device=self._device)
        with torch.inference_mode():
            return self._model.base_model(ids).last_hidden_state[0].float().cpu()

    def prompt_logprobs(self, prompt: list[int]) -> torch.Tensor:
        """Of what could stand at each position of `prompt` from the second on: float32 [len(prompt) - 1, vocab]."""
        return self.logits(prompt[:1], prompt[1:]).log_softmax(-1)

    def beams(self, prompt: list[int], width: int, max_tokens: int, length_penalty: float) -> list[list[int]]:
        """The outputs of its beam search, best first, each up to and with its end token."""
        ids = torch.tensor([prompt])
        config = self._model.generation_config
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=max_tokens,
                length_penalty=length_penalty,
                early_stopping=False,
                do_sample=False,
            )
        ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id or ())
        return [_up_to_end(sequence[len(prompt) :], ends) for sequence in out.tolist()]

    def greedy(self, prompts: list[list[int]], max_tokens: int) -> list[Greedy]:
        """`max_tokens` tokens of `generate` for prompts of one length; end-of-sequence tokens do not stop it."""
        self._model.generation_config.eos_token_id = None
        ids = torch.tensor(prompts)
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
        sequences = out.sequences[:, ids.shape[1] :].tolist()
        by_prompt = torch.stack(out.logits, dim=1)  # [prompts, max_tokens, vocab]
        return [_told(tokens, logits) for tokens, logits in zip(sequences, by_prompt, strict=True)]


def _told(tokens: list[int], logits: torch.Tensor) -> Greedy:
    best = logits.topk(2).values
    chosen = logits.log_softmax(-1)[range(len(tokens)), tokens]
    return Greedy(tokens, chosen.tolist(), (best[:, 0] - best[:, 1]).tolist())


def _up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Without what fills a sequence up to the longest one's length."""
    end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]
