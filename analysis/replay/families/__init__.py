"""Policies: rules that choose experts from router logits. A file a family; see registry."""
