"""The report of runs: one page that opens from a disk, with an explorer that moves."""
