"""Null models: fitted from logs, refitted, merged, compared, checked and drawn."""
