"""Replay: decisions at other settings, recomputed from logged logits."""
