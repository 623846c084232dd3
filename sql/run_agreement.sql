-- run_agreement.sql
-- How far do two runs over the same text choose the same experts?
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Needs   two runs
-- Needs   the same text
-- Param   $first text = NULL  a run, by default the first one opened
-- Param   $second text = NULL  another, by default the last one opened
-- Returns one row per layer: tokens (in both runs), first_experts and second_experts (mean experts
--         per token), and as shares of tokens: same_number, same_first_choice, same_experts (equal
--         sets); jaccard (mean of shared experts over experts in either)
WITH first_decision AS (
    SELECT layer, rank, sequence, position, n_selected, experts
    FROM routing
    WHERE run = coalesce($first, (SELECT first(run) FROM runs))
),

second_decision AS (
    SELECT layer, rank, sequence, position, n_selected, experts
    FROM routing
    WHERE run = coalesce($second, (SELECT last(run) FROM runs))
),

pair AS (
    SELECT
        layer,
        a.n_selected AS n_first,
        b.n_selected AS n_second,
        a.experts[1] IS NOT DISTINCT FROM b.experts[1] AS same_first_choice,
        n_shared(a.experts, b.experts) AS n_both
    FROM first_decision AS a
    JOIN second_decision AS b USING (layer, rank, sequence, position)
)

SELECT
    layer,
    count(*) AS tokens,
    avg(n_first) AS first_experts,
    avg(n_second) AS second_experts,
    avg((n_first = n_second)::INTEGER) AS same_number,
    avg(same_first_choice::INTEGER) AS same_first_choice,
    avg((n_both = n_first AND n_both = n_second)::INTEGER) AS same_experts,
    avg(n_both / nullif(n_first + n_second - n_both, 0)) AS jaccard
FROM pair
GROUP BY layer
ORDER BY layer;
