"""The index tensors of one step, built once per stage and step. Whatever the attention needs is in `tiles`.

Shapes: T tokens of the step, S slices, R rows that are sampled, P pages of the longest slice.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.plan import Plan

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """All tokens of a plan, slice after slice in one dimension. The numpy arrays feed `tiles.plan_attention`."""

    token_ids_T: Tensor
    positions_T: Tensor
    sample_rows_R: Tensor  # the last row of each slice that has `sample`, in plan order
    sample_rows: Ints  # R
    positions: Ints  # T
    slots: Ints  # T: page * page_tokens + offset in the page, where the token's K and V go
    starts: Ints  # S: position of the slice's first token
    lengths: Ints  # S: number of tokens
    page_table: Ints  # SP: rows shorter than the longest repeat their last page
    page_tokens: int

    @classmethod
    def from_plan(cls, plan: Plan, page_tokens: int, device: torch.device) -> "Batch":
        """`plan` has at least one slice, and each slice at least one token and the pages for all of its positions."""
        lengths = np.array([len(part.tokens) for part in plan.slices], dtype=np.int64)
        starts = np.array([part.start for part in plan.slices], dtype=np.int64)
        table = _page_table([part.pages for part in plan.slices])
        ends = np.cumsum(lengths)
        slice_of = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(ends[-1]) - (ends - lengths - starts)[slice_of]
        slots = table[slice_of, positions // page_tokens] * page_tokens + positions % page_tokens
        token_ids = np.fromiter(chain.from_iterable(part.tokens for part in plan.slices), np.int64, int(ends[-1]))
        sampled = np.array([part.sample is not None for part in plan.slices], dtype=bool)
        return cls(
            token_ids_T=torch.from_numpy(token_ids).to(device),
            positions_T=torch.from_numpy(positions).to(device),
            sample_rows_R=torch.from_numpy(ends[sampled] - 1).to(device),
            sample_rows=ends[sampled] - 1,
            positions=positions,
            slots=slots,
            starts=starts,
            lengths=lengths,
            page_table=table,
            page_tokens=page_tokens,
        )


def _page_table(pages: list[list[int]]) -> Ints:
    table = np.empty((len(pages), max(map(len, pages))), dtype=np.int64)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
        row[len(own) :] = own[-1]
    return table
