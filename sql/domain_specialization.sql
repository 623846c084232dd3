-- domain_specialization.sql
-- What share of a domain's tokens does each expert serve?
--
-- Domain specialization (E, D) = N(E, D) / N(D): N(E, D) tokens of domain D have expert E among
-- their first k choices, N(D) tokens are of domain D. Muennighoff et al. (2024), OLMoE, section 5.3.
-- The domain is the source of the text. even is the share under even load: mean choices per token
-- over the number of experts.
--
-- Reads   routing (one row per run, token and layer), tokens (one row per run and token), runs
-- Needs   sources
-- Param   $k integer = NULL  only the first k choices count, by default all selected experts
-- Param   $layer integer = NULL  only this layer
-- Returns one row per run, layer, source and expert: specialization, even
WITH decision AS (
    SELECT run, layer, source, experts[1:coalesce($k, n_selected)] AS experts
    FROM routing
    JOIN tokens USING (run, rank, sequence, position)
    WHERE source IS NOT NULL AND ($layer IS NULL OR layer = $layer)
),

source AS (
    SELECT run, layer, source, count(*) AS n, sum(len(experts)) AS n_choices
    FROM decision
    GROUP BY run, layer, source
),

count_of_expert AS (
    SELECT run, layer, source, expert, count(*) AS n
    FROM (SELECT run, layer, source, unnest(experts) AS expert FROM decision)
    GROUP BY run, layer, source, expert
),

expert AS (
    SELECT run, n_experts, unnest(range(n_experts)) AS expert
    FROM runs
)

SELECT
    run,
    layer,
    source,
    expert,
    coalesce(c.n, 0) / s.n AS specialization,
    s.n_choices / s.n / n_experts AS even
FROM source AS s
JOIN expert USING (run)
LEFT JOIN count_of_expert AS c USING (run, layer, source, expert)
ORDER BY run, layer, source, expert;
