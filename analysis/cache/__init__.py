"""Which experts a cache of some of them would have had at hand."""
