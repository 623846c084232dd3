"""Verification: is a run whole, and what does it hold?"""
