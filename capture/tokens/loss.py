"""The loss of each token, from what the model's head returned."""

import torch
from torch import Tensor

from bhlog.capture.tokens.cross_entropy import cross_entropy
from bhlog.capture.tokens.stream import Forward

_KEPT_ROWS = 64  # logits kept for the next forward's first token, in case drafts are rejected


@torch.no_grad()
def token_loss(forward: Forward, head: Tensor) -> Tensor | None:
    """(B * S,) float32 cross entropy of each token in nats, NaN where unknown.

    The loss of a token comes from the head's logits one column before it, in this forward or at the
    end of the one before. Remembers the last logits in the stream for the forward that follows, a
    copy, so that the head's output is not kept alive.

    Args:
        forward: whose tokens they are.
        head: (B, H, V), the head's output at the last H of the forward's S columns.

    Returns:
        None if nothing is known: no token ids, or no logits that could belong to a token.
    """
    keep, ids = forward.keep.to(head.device), forward.token_ids
    B, S = keep.shape
    H = head.shape[1]
    if head.shape[0] != B or not 0 < H <= S:
        return None
    kept = H if B * H <= _KEPT_ROWS else 1
    forward.stream.last_logits = head[:, -kept:].clone()
    if ids is None:
        return None
    ids = ids.to(head.device)
    known = None
    if forward.foreign:
        known, ids = (ids >= 0) & (ids < head.shape[2]), ids.clamp(0, head.shape[2] - 1)
    first = torch.full((B, 1), torch.nan, device=head.device)
    if forward.head_start is not None and forward.follows is not None:
        loss = cross_entropy(forward.head_start.to(head.device), ids[:, 0])
        first = torch.where(forward.follows.to(head.device), loss, torch.nan)[:, None]
    nll = first
    if S > 1:
        nll = torch.full((B, S), torch.nan, device=head.device)
        nll[:, :1] = first
    if H > 1:
        for row in range(B):  # a row is contiguous; the batch without its last column is not
            nll[row, S - H + 1 :] = cross_entropy(head[row, :-1], ids[row, S - H + 1 :])
        # the token after padding has no token before it
        nll[:, 1:].masked_fill_(~keep[:, :-1], torch.nan)
    if known is not None:
        nll = torch.where(known, nll, torch.nan)
    return nll.view(-1)
