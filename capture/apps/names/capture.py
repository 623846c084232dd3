"""The names of bhlog.capture, for programs that import them from `capture`."""

from pkgutil import extend_path

from bhlog import capture as _names

__getattr__, __dir__, __all__ = _names.__getattr__, _names.__dir__, _names.__all__

# A folder `capture` of the user's that has no __init__.py keeps its modules beside these names.
__path__: list[str] = extend_path([], __name__)
