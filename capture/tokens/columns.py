"""Which columns of a batch are tokens and which are padding, as the attention mask says."""

from typing import Any

import torch
from torch import Tensor

from bhlog.capture.contract.errors import UnknownIdentity


def new_columns(mask: Any, batch: int, start: int, length: int, device: torch.device) -> Tensor:
    """(batch, length) bool: the columns from `start` on that are tokens.

    Args:
        mask: the base model's attention_mask: None; (B, K) with one for tokens, of the new columns
            or of all; (B or 1, heads, length, K) as attention takes it; or several of the latter by
            kind of layer.

    Raises:
        UnknownIdentity: the mask is of another kind.
    """
    mask = _one_mask(mask)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    width = mask.shape[-1]
    if mask.dim() == 2 and (width >= start + length or width == length):
        first = start if width >= start + length else 0
        new = mask[:, first : first + length].to(device, torch.bool, copy=True)
    elif mask.dim() == 4 and mask.shape[2] == length and width >= length:
        visible = _visible(mask)
        # a query sees its own column unless that is padding; a row with nothing to see may have
        # been opened up, and then sees the future too
        first = start if width >= start + length else width - length
        queries = torch.arange(length, device=mask.device)
        new = visible[:, queries, queries + first]
        if width > first + 1:
            ahead = (queries + first + 1).clamp(max=width - 1)
            new = new & ~(visible[:, queries, ahead] & (queries + first + 1 < width))
        new = new.to(device)
    else:
        raise UnknownIdentity(
            f"attention_mask has shape {tuple(mask.shape)} for {length} new tokens after {start}; "
            "expected one column per token, so that padding can be told from tokens"
        )
    result: Tensor = new.expand(batch, length)
    return result


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
    """(B or 1, Q, K) bool: which columns each query attends to."""
    first: Tensor = mask[:, 0]
    return first if first.dtype == torch.bool else first == 0
