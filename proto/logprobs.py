"""Log-probabilities of a prompt's tokens, packed: workers compute them, the token plane carries them to frontends."""

import msgspec
import numpy as np

from baton.proto.messages import TokenLogprobs


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Of the tokens from the second on: nothing stands before the first."""

    top: int
    """Alternatives of each token."""
    data: bytes
    """int32 [num_tokens, 2 + 2 * top]: the token's logprob as float32 bits, its rank, ids of the best, their logprobs
    as float32 bits."""

    def entries(self, top: int | None = None) -> list[TokenLogprobs]:
        """One for each token from the second on, with so many alternatives; None: all."""
        top = self.top if top is None else min(top, self.top)
        words = np.frombuffer(self.data, dtype=np.int32).reshape(-1, 2 + 2 * self.top)
        floats = words.view(np.float32)
        ids, logprobs = words[:, 2 : 2 + top].tolist(), floats[:, 2 + self.top : 2 + self.top + top].tolist()
        return [
            TokenLogprobs(logprob, rank, tuple(zip(*best, strict=True)))
            for logprob, rank, *best in zip(floats[:, 0].tolist(), words[:, 1].tolist(), ids, logprobs, strict=True)
        ]


def entry_bytes(top: int) -> int:
    """Length of one token's part of PromptLogprobs.data."""
    return 4 * (2 + 2 * top)
