"""Which columns of a batch are tokens and which are padding, as the attention mask says."""

from typing import Any

import torch
from torch import Tensor

from bhlog.capture.contract.errors import UnknownIdentity

_HIDES = -1e4  # the least that models add to a score in order to hide a column


def new_columns(mask: Any, batch: int, start: int, length: int, device: torch.device) -> Tensor:
    """(batch, length) bool: the columns from `start` on that are tokens.

    Args:
        mask: the base model's attention_mask: None; (B, K) with one for tokens, of the new columns
            or of all; (B or 1, heads, length, K) as attention takes it; or several of the latter by
            kind of layer.

    Raises:
        UnknownIdentity: the mask is of another kind, or says that a row is not one sequence.
    """
    whole = not isinstance(mask, dict) or "full_attention" in mask
    mask = _one_mask(mask)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    width = mask.shape[-1]
    if mask.dim() == 2 and (width >= start + length or width == length):
        first = start if width >= start + length else 0
        new = mask[:, first : first + length]
        if length > 1 and new.dtype != torch.bool and bool(((new != 0) & (new != 1)).any()):
            raise UnknownIdentity(
                "attention_mask has other numbers than 0 and 1: numbers of several sequences that "
                "are packed in a row, or scores; run one sequence per row, with 1 for tokens"
            )
        new = new.to(device, torch.bool, copy=True)
    elif mask.dim() == 4 and mask.shape[2] == length and width >= length:
        visible = _visible(mask)
        first = start if width >= start + length else width - length
        new = _seen(visible, first)
        if whole and length > 1:
            _require_one_sequence(visible, new, first)
        new = new.to(device)
    else:
        raise UnknownIdentity(
            f"attention_mask has shape {tuple(mask.shape)} for {length} new tokens after {start}; "
            "expected one column per token, so that padding can be told from tokens"
        )
    result: Tensor = new.expand(batch, length)
    return result


def _seen(visible: Tensor, first: int) -> Tensor:
    """(B or 1, Q) bool: which queries are tokens, at the columns from `first` on.

    A token sees its own column, and padding does not; or padding is a row with nothing to see that
    was opened up for some kernel and sees every column, those ahead of it too. Tokens may do that
    as well, where attention runs both ways, but then others see their columns as well.
    """
    Q, K = visible.shape[1:]
    if Q == 1:  # a decoded token: a few operations less
        sees_itself = visible[:, 0, first : first + 1]
        return sees_itself if first == K - 1 else sees_itself & ~visible[:, 0].all(1, keepdim=True)
    own = torch.arange(first, first + Q, device=visible.device)
    sees_itself = visible[:, torch.arange(Q, device=visible.device), own]
    opened = visible.all(dim=-1) & (own < K - 1)
    by_others = (visible & ~opened[:, :, None])[:, :, first : first + Q].any(dim=1)
    return sees_itself & by_others


def _require_one_sequence(visible: Tensor, token: Tensor, first: int) -> None:
    """Raise if a new token does not see the new token before it.

    Blocks along the diagonal are several sequences in a row, and a tree is several continuations.
    """
    Q = visible.shape[1]
    new = visible[:, :, first : first + Q]
    place = torch.arange(Q, device=visible.device)
    # the last token before each query, -1 if it is the first
    last = torch.where(token, place, -1).cummax(dim=1).values
    before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)
    sees = new.gather(2, before.clamp(min=0)[:, :, None])[:, :, 0]
    if bool((token & (before >= 0) & ~sees).any()):
        raise UnknownIdentity(
            "attention_mask keeps tokens of a row from the token before them: it packs several "
            "sequences in a row, or a tree of them, and bhlog cannot tell them apart; run one "
            "sequence per row"
        )


def past_columns(mask: Any, batch: int, start: int, device: torch.device) -> Tensor:
    """(batch, start) bool: columns before `start`, tokens unless a (B, K) mask hides them."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > start:
        return mask[:, :start].to(device=device, dtype=torch.bool, copy=True)
    return torch.ones(batch, start, dtype=torch.bool, device=device)


def mask_width(mask: Any) -> int:
    """Columns that an attention mask covers; 0 without one."""
    mask = _one_mask(mask)
    return 0 if mask is None else int(mask.shape[-1])


def packed(inputs: dict[str, Any], real: Tensor) -> bool:
    """Whether a row of the forward holds several sequences.

    Args:
        inputs: the base model's arguments.
        real: (B, S) bool, columns that are tokens.
    """
    if inputs.get("cu_seq_lens_q") is not None:
        return True
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return False
    neighbours = real[:, 1:] & real[:, :-1]
    backwards = positions.diff(dim=1).to(real.device) <= 0
    return bool((backwards & neighbours).any())


def _one_mask(mask: Any) -> Tensor | None:
    """The mask to read; of several, that of full attention."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is not None and not isinstance(mask, Tensor):
        raise UnknownIdentity(
            f"attention_mask is a {type(mask).__name__}, in which padding cannot be told from "
            "tokens; pass a (batch, columns) tensor, or use another attention implementation"
        )
    return mask


def _visible(mask: Tensor) -> Tensor:
    """(B or 1, Q, K) bool: which columns each query attends to, by any head.

    Numbers are added to attention's scores: what hides a column is far below any bias of them.
    """
    visible = mask if mask.dtype == torch.bool else mask > _HIDES
    return visible[:, 0] if visible.shape[1] == 1 else visible.any(dim=1)
