"""Policies: rules that choose experts from router logits. A file a family; see families()."""

from bhlog.analysis.replay.policy import Choice, Policy
from bhlog.analysis.replay.registry import families, parse_policy
from bhlog.analysis.replay.rows import Rows

__all__ = ["Choice", "Policy", "Rows", "families", "parse_policy"]
