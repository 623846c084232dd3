"""Answers on their way out, in the files that other engines read."""
