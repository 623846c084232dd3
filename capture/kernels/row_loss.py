"""The loss of each row of logits in one pass over them; imported only where Triton is installed."""

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def cross_entropy_kernel(logits, targets, result, row_stride, n_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row: a running maximum and sum of exponentials in each lane, then joined."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_columns, BLOCK):
        columns = first + lanes
        x = tl.load(start + columns, mask=columns < n_columns, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        safe = tl.where(new == float("-inf"), 0.0, new)  # a lane that has seen nothing yet
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = new
    top = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp(largest - top), axis=0)
    target = tl.load(start + tl.load(targets + row)).to(tl.float32)
    tl.store(result + row, top + tl.log(total) - target)
