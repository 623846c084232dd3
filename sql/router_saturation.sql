-- router_saturation.sql
-- How close is a checkpoint's routing to that of a later one, on the same text?
--
-- Router saturation (t) = mean over tokens of |E(t) and E(T)| / k, with E(t) the k experts that a
-- token selects at checkpoint t and E(T) those at the last one. Muennighoff et al. (2024), OLMoE,
-- section 5.1. Where k varies by token it is the number selected at T. Tokens that only one run has,
-- or for which none is selected at T, do not count. k=1 compares first choices alone, as beside all 8
-- in the paper's figure.
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Needs   two runs
-- Needs   the same text
-- Param   $run text = NULL  the run of checkpoint t, by default the first one opened
-- Param   $last text = NULL  the run of checkpoint T, by default the last one opened
-- Param   $k integer = NULL  only the first k choices of both count, by default all selected experts
-- Returns one row per layer: tokens (in both runs), saturation, by_chance (for experts drawn at
--         random, as many as selected)
WITH decision AS NOT MATERIALIZED (
    SELECT
        run,
        layer,
        rank,
        sequence,
        position,
        n_selected,
        experts[1:coalesce($k, n_selected)] AS experts
    FROM routing
)

SELECT
    layer,
    count(*) AS tokens,
    avg(n_shared(t.experts, l.experts) / len(l.experts)) AS saturation,
    avg(len(t.experts)) / (SELECT max(n_experts) FROM runs) AS by_chance
FROM decision AS t
JOIN decision AS l USING (layer, rank, sequence, position)
WHERE
    t.run = coalesce($run, (SELECT first(run) FROM runs))
    AND l.run = coalesce($last, (SELECT last(run) FROM runs))
    AND l.n_selected > 0
GROUP BY layer
ORDER BY layer;
