"""Record router logits and Benjamini-Hochberg decisions of mixture-of-experts models."""

import lazy_loader

# Lazy: analysis imports the contract modules of this package without torch. By its full name, so
# that `capture` and `bhlog.capture` give the same objects.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub("bhlog.capture", __file__)

# In a clone this folder is `capture` too, and gives the names; its modules would be copies.
if __name__ != "bhlog.capture":
    __path__ = []
