-- expert_load.sql
-- How much of the work does each expert get?
--
-- share_of_tokens = tokens that select the expert / tokens. load is its selections over those of an
-- expert under even load: 1 is even, 2 is twice as many.
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Param   $layer integer = NULL  only this layer
-- Returns one row per run, layer and expert, those without a selection included: selections,
--         share_of_tokens, load
WITH selection AS (
    SELECT run, layer, unnest(experts) AS expert
    FROM routing
    WHERE $layer IS NULL OR layer = $layer
),

expert AS (
    SELECT run, layer, unnest(range(n_experts)) AS expert
    FROM (SELECT run, n_experts, unnest(layers) AS layer FROM runs)
    WHERE $layer IS NULL OR layer = $layer
),

count_of_layer AS (
    SELECT run, layer, count(*) AS tokens
    FROM routing
    GROUP BY run, layer
),

count_of_expert AS (
    SELECT run, layer, expert, count(*) AS n
    FROM selection
    GROUP BY run, layer, expert
)

SELECT
    run,
    layer,
    expert,
    coalesce(n, 0) AS selections,
    coalesce(n, 0) / tokens AS share_of_tokens,
    coalesce(n, 0) / nullif(avg(coalesce(n, 0)) OVER (PARTITION BY run, layer), 0) AS load
FROM expert
JOIN count_of_layer USING (run, layer)
LEFT JOIN count_of_expert USING (run, layer, expert)
ORDER BY run, layer, expert;
