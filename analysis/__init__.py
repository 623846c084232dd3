"""Ask the log of a run: replay it at other settings, fit null models, query it in SQL.

Needs neither torch nor transformers.
"""

import lazy_loader

# Lazy: `import analysis` costs nothing, and `bhlog --help` loads no library of numbers. By its full
# name, so that `analysis` and `bhlog.analysis` give the same objects.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub("bhlog.analysis", __file__)

# In a clone this folder is `analysis` too, and gives the names; its modules would be copies.
if __name__ != "bhlog.analysis":
    __path__ = []
