"""The names of bhlog.capture, for programs that import them from `capture`."""

from bhlog import capture as _names

__getattr__, __dir__, __all__ = _names.__getattr__, _names.__dir__, _names.__all__
