"""Compiled loops: what replay, sweeps, fits and questions do to every logit of a log."""
