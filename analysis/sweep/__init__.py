"""Sweep: answers at every alpha, from one pass over a log."""
