-- load_by_position.sql
-- Do tokens get more experts early or late in their sequence?
--
-- Reads   routing (one row per run, token and layer)
-- Param   $width integer = 64  positions per bucket
-- Param   $layer integer = NULL  only this layer
-- Returns one row per run and bucket of positions: first_position, last_position, rows (of a token
--         and a layer), mean_experts, sd_experts
SELECT
    run,
    position // $width * $width AS first_position,
    max(position) AS last_position,
    count(*) AS rows,
    avg(n_selected) AS mean_experts,
    stddev_pop(n_selected) AS sd_experts
FROM routing
WHERE $layer IS NULL OR layer = $layer
GROUP BY run, first_position
ORDER BY run, first_position;
