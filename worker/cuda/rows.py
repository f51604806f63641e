"""A plan's rows as columns, which is how they are copied to the device."""

import numpy as np

from baton.worker.plan import Row


class Rows:
    """slots, lengths, seq_lens and output_indices int64 [rows], query_start [rows + 1], positions [num_tokens];
    prompt_indices: the tokens whose logits are wanted for the rows' targets, int64 [all targets]."""

    def __init__(self, rows: list[Row]) -> None:
        columns = np.array(
            [(row.slot, row.start, row.num_tokens, row.samples, row.output_index) for row in rows], dtype=np.int64
        )
        self.slots, starts, self.lengths, samples, self.output_indices = columns.T
        self.sampling = np.flatnonzero(samples)
        self.query_start = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=self.query_start[1:])
        self.num_tokens = int(self.query_start[-1])
        self.seq_lens = starts + self.lengths
        self.sequence = np.repeat(np.arange(len(rows)), self.lengths)
        self.positions = np.arange(self.num_tokens) + (starts - self.query_start[:-1])[self.sequence]
        self.all_decode = self.num_tokens == len(rows) == len(self.sampling)
        pairs = zip(rows, self.query_start, strict=False)
        wanted = [start + np.arange(len(row.targets)) for row, start in pairs if row.targets]
        self.prompt_indices = np.concatenate(wanted) if wanted else np.zeros(0, dtype=np.int64)

    def token_ids(self, rows: list[Row]) -> list[int]:
        """[num_tokens]; -1 stands for the token that the slot sampled last."""
        return [token for row in rows for token in (row.tokens or (-1,))]
