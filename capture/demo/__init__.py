"""The demonstration model: a tiny OLMoE trained on Python's own documentation and sources."""
