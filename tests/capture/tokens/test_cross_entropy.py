"""Cross entropy in pieces against torch's own."""

import pytest
import torch

from bhlog.capture.tokens.cross_entropy import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 2100])
def test_cross_entropy_in_pieces_is_torchs(dtype, rows):
    logits = torch.randn(rows, 50).to(dtype)
    targets = torch.randint(0, 50, (rows,))
    truth = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    found = cross_entropy(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
