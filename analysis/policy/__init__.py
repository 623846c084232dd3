"""Policies: rules that choose experts from router logits. A file a family; see families()."""

from analysis.policy.policy import Choice, Policy
from analysis.policy.registry import families, parse_policy
from analysis.policy.rows import Rows

__all__ = ["Choice", "Policy", "Rows", "families", "parse_policy"]
