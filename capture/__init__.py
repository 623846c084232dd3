"""Record router logits and Benjamini-Hochberg decisions of mixture-of-experts models."""

import lazy_loader

# Lazy: analysis imports the contract modules of this package without torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
