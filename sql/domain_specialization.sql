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
WITH source AS (
    SELECT run, source, count(*) AS n_tokens
    FROM tokens
    WHERE source IS NOT NULL
    GROUP BY run, source
),

choice AS (
    SELECT
        run,
        layer,
        source,
        unnest(CASE WHEN $k IS NULL THEN experts ELSE experts[1:$k] END) AS expert
    FROM routing
    JOIN tokens USING (run, rank, sequence, position)
    WHERE source IS NOT NULL AND ($layer IS NULL OR layer = $layer)
),

count_of_expert AS (
    SELECT run, layer, source, expert, count(*) AS n
    FROM choice
    GROUP BY run, layer, source, expert
),

expert AS (
    SELECT run, layer, unnest(range(n_experts)) AS expert
    FROM (SELECT run, n_experts, unnest(layers) AS layer FROM runs)
    WHERE $layer IS NULL OR layer = $layer
)

SELECT
    run,
    layer,
    source,
    expert,
    coalesce(n, 0) / n_tokens AS specialization,
    avg(coalesce(n, 0)) OVER (PARTITION BY run, layer, source) / n_tokens AS even
FROM source
JOIN expert USING (run)
LEFT JOIN count_of_expert USING (run, layer, source, expert)
ORDER BY run, layer, source, expert;
