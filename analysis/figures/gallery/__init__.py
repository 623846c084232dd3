"""The figures: a file a theme; see bhlog.analysis.figures.registry."""
