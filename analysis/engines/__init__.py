"""Traces of other engines, read and written as runs."""
