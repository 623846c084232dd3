-- floor_and_ceiling.sql
-- How often do the bounds min_k and max_k decide, rather than the rule?
--
-- Under native routing both bounds are the model's top-k and n_rejected is unknown.
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Returns one row per run and layer: tokens, min_k, max_k, and as shares of tokens: at_floor
--         (n_selected = min_k), raised (n_rejected < min_k), at_ceiling (n_selected = max_k),
--         cut (n_rejected > max_k), none_rejected (n_rejected = 0)
WITH bound AS (
    SELECT
        run,
        CASE routing WHEN 'bh' THEN min_k ELSE top_k END AS min_k,
        CASE routing WHEN 'bh' THEN coalesce(max_k, n_experts) ELSE top_k END AS max_k
    FROM runs
)

SELECT
    run,
    layer,
    count(*) AS tokens,
    any_value(min_k) AS min_k,
    any_value(max_k) AS max_k,
    avg((n_selected = min_k)::INTEGER) AS at_floor,
    avg((n_rejected < min_k)::INTEGER) AS raised,
    avg((n_selected = max_k)::INTEGER) AS at_ceiling,
    avg((n_rejected > max_k)::INTEGER) AS cut,
    avg((n_rejected = 0)::INTEGER) AS none_rejected
FROM routing
JOIN bound USING (run)
GROUP BY run, layer
ORDER BY run, layer;
