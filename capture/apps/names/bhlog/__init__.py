"""bhlog: record the routers of mixture-of-experts models, replay their decisions offline."""

import lazy_loader

# Lazy: the offline names load no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
