"""Counting the logits of routing tables into histograms, while they are written or afterwards."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.errors import CorruptShard
from bhlog.capture.contract.null.histogram import HistogramAccumulator
from bhlog.capture.writing.place import Place


def counted(tables: Iterable[pa.Table], counts: HistogramAccumulator) -> Iterator[pa.Table]:
    """The routing tables of a shard, one per layer, whose logits are counted on their way."""
    for table in tables:
        _count(table, counts)
        yield table


def count_shard(place: Place, path: str, counts: HistogramAccumulator) -> None:
    """Count the logits of a sealed routing shard of a run, by its path inside it.

    Raises:
        CorruptShard: it cannot be read.
    """
    try:
        with (
            place.open(path) as opened,
            pq.ParquetFile(opened, page_checksum_verification=True) as file,
        ):
            for group in range(file.num_row_groups):  # a row group holds one layer
                _count(file.read_row_group(group, columns=["layer", "logits"]), counts)
    except (pa.ArrowException, OSError) as error:
        raise CorruptShard(
            f"{place}/{path}: cannot be read, so its rows cannot count in the null model "
            f"({error}); bhlog verify says what is wrong with the run"
        ) from error


def _count(table: pa.Table, counts: HistogramAccumulator) -> None:
    """Count the rows of a table that holds one layer."""
    for chunk in table["logits"].chunks:
        flat: NDArray[np.float32] = values_of(chunk.flatten())
        counts.update(table["layer"][0].as_py(), flat.reshape(len(chunk), -1))
