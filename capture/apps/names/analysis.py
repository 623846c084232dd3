"""The names of bhlog.analysis, for programs that import them from `analysis`."""

from bhlog import analysis as _names

__getattr__, __dir__, __all__ = _names.__getattr__, _names.__dir__, _names.__all__
