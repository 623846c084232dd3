"""Policies compared over one log, at equal cost."""
