-- shard_sizes.sql
-- How many rows and bytes does each shard hold?
--
-- Reads   shards (one row per file)
-- Returns one row per run and shard: routing_rows, routing_bytes, bytes_per_row (of routing),
--         token_rows, token_bytes
SELECT
    run,
    shard,
    sum(rows) FILTER (WHERE folder = 'routing') AS routing_rows,
    sum(bytes) FILTER (WHERE folder = 'routing') AS routing_bytes,
    routing_bytes / nullif(routing_rows, 0) AS bytes_per_row,
    sum(rows) FILTER (WHERE folder = 'tokens') AS token_rows,
    sum(bytes) FILTER (WHERE folder = 'tokens') AS token_bytes
FROM shards
GROUP BY run, shard
ORDER BY run, shard;
