"""Padding that no attention mask names: left out where the caller names its id, else counted."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

_OFTEN = 0.1  # share of rows above which any id that they repeat at an end is suspected
_FEW = 4  # as many rows may do so by chance
_LONG = 8  # tokens of a row that are all one id: no text


def without_runs(token_ids: Tensor, pad_token_id: int, *, begins: bool) -> Tensor:
    """(B, S) bool: False on runs of pad_token_id at the end of a row, and where a row begins.

    Args:
        token_ids: (B, S).
        begins: whether the rows begin here; within a text the id at the start of a chunk is text.
    """
    pad = (token_ids == pad_token_id).long()
    runs = pad.flip(1).cumprod(dim=1).flip(1)
    if begins:
        runs = runs | pad.cumprod(dim=1)
    return runs == 0


@dataclass(eq=False)
class Suspects:
    """Counts, on the device, rows without attention mask whose ends repeat an id.

    Attributes:
        n_ids: ids that the model knows.
        likely: ids that pad where anything does: the model's own for that, its first and last ones,
            and 0.
        pad: the model's own for that; a single one at an end is suspected.
        rows: rows seen.
    """

    n_ids: int
    likely: Collection[int]
    pad: int | None
    rows: int = 0
    _counts: Tensor | None = field(default=None, repr=False)  # (4, n_ids)

    def notice(self, token_ids: Tensor) -> None:
        """Count the rows of a forward, (B, S) ids that begin here; waits for nothing."""
        B, S = token_ids.shape
        if S < 2:
            return
        self.rows += B
        if self._counts is None:
            self._counts = torch.zeros(4, self.n_ids, dtype=torch.long, device=token_ids.device)
        for ids in (token_ids, token_ids.flip(1)):
            end = ids[:, -1].to(self._counts.device)
            run = (ids == ids[:, -1:]).long().flip(1).cumprod(dim=1).sum(dim=1).to(end.device)
            alone = run == S
            some = (run > 1) & ~alone
            self._counts[0].index_add_(0, end, some.long())
            self._counts[1].index_add_(0, end, run * some)
            self._counts[2].index_add_(0, end, (run == 1).long())
            self._counts[3].index_add_(0, end, run * alone * (S >= _LONG))

    def words(self) -> str | None:
        """What may be filler, or None if nothing looks like it. Waits for the device."""
        if self._counts is None:
            return None
        rows, tokens, single, alone = self._counts.cpu()
        found = []
        for i in torch.where((rows > 0) | (alone > 0) | (single > 0))[0].tolist():
            n, total = int(rows[i]), int(tokens[i])
            if i == self.pad:
                n, total = n + int(single[i]), total + int(single[i])
            if n and (i in self.likely or (n > _FEW and n > _OFTEN * self.rows)):
                found.append(f"{n} begin or end with id {i} ({total} tokens)")
            if alone[i]:
                found.append(f"some are id {i} alone ({int(alone[i]) // 2} tokens)")
        if not found:
            return None
        return (
            f"of {self.rows} rows that the model was given without attention_mask, "
            f"{'; '.join(found)}. If that is padding, or a trial of batch sizes, it was logged as "
            "tokens: pass an attention_mask or pad_token_id=, or run what is no text inside "
            "`with patcher.paused():`"
        )
