"""The interface of earlier notebooks."""
