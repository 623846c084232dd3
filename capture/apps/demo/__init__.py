"""The demonstration: its text and its story."""
