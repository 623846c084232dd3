"""Writing a run in the background: rows leave the device, fill a buffer and become shards."""
