-- dead_and_hot_experts.sql
-- Which experts are hardly used, and which are overused?
--
-- load is an expert's selections over those of an expert under even load in its layer.
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Param   $dead number = 0.1  an expert is dead at this load or below
-- Param   $hot number = 3  and hot at this load or above
-- Returns one row per run, layer and expert that is dead or hot, by falling load: selections, load,
--         verdict
WITH selection AS (
    SELECT run, layer, unnest(experts) AS expert
    FROM routing
),

expert AS (
    SELECT run, layer, unnest(range(n_experts)) AS expert
    FROM (SELECT run, n_experts, unnest(layers) AS layer FROM runs)
),

count_of_expert AS (
    SELECT run, layer, expert, count(*) AS n
    FROM selection
    GROUP BY run, layer, expert
),

expert_with_load AS (
    SELECT
        run,
        layer,
        expert,
        coalesce(n, 0) AS selections,
        coalesce(n, 0) / nullif(avg(coalesce(n, 0)) OVER (PARTITION BY run, layer), 0) AS load
    FROM expert
    LEFT JOIN count_of_expert USING (run, layer, expert)
)

SELECT
    run,
    layer,
    expert,
    selections,
    load,
    CASE WHEN load <= $dead THEN 'dead' ELSE 'hot' END AS verdict
FROM expert_with_load
WHERE load <= $dead OR load >= $hot
ORDER BY run, load DESC, layer, expert;
