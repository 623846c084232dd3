"""Runs in DuckDB: views, functions, the questions of sql/, and the prompt."""
