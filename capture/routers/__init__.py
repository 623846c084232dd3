"""Routers of model families: where they are, what they return, and how BH steers them."""
