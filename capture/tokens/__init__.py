"""Tokens: which one each router row belongs to, and its loss."""
