"""bhlog: record the routers of mixture-of-experts models, replay their decisions offline."""

from typing import Any

from bhlog import analysis, capture

# The names of both halves, each looked up when it is asked for: the offline ones load no torch.
__all__ = sorted({*analysis.__all__, *capture.__all__})


def __getattr__(name: str) -> Any:
    for half in (analysis, capture):
        if name in half.__all__:
            return getattr(half, name)
    raise AttributeError(f"module 'bhlog' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "analysis", "capture"]
