-- coactivation.sql
-- Which experts of a layer are selected together?
--
-- N(a) is the number of tokens that select expert a, N(a, b) that select both, T all tokens.
-- coactivation = N(a, b) / N(a), as in Muennighoff et al. (2024), OLMoE, section 5.2;
-- lift = N(a, b) T / (N(a) N(b)): 1 is what independent experts would give.
-- The paper's own script (allenai/OLMoE, run_moe_analysis.py) counts adjacent pairs alone: experts at
-- the ranks r and r + 1 by falling logit. pairs=adjacent counts these as N(a, b): of 8 experts 7 of
-- the 28 pairs, so its figures are about a quarter of those of all pairs.
--
-- Reads   routing (one row per run, token and layer)
-- Param   $layer integer = NULL  only this layer
-- Param   $min_tokens integer = 10  leave out pairs that fewer tokens select
-- Param   $pairs text = all  "all", or "adjacent" as the paper's script counts
-- Param   $top integer = 20  at most this many pairs per run and layer, by falling lift
-- Returns one row per run, layer and pair of experts, first < second: tokens (N(a, b)),
--         coactivation_first = N(a, b) / N(a), coactivation_second = N(a, b) / N(b), lift
WITH count_of_layer AS (
    SELECT run, layer, count(*) AS tokens
    FROM routing
    GROUP BY run, layer
),

decision AS (
    SELECT run, layer, experts
    FROM routing
    WHERE $layer IS NULL OR layer = $layer
),

selection AS (
    SELECT run, layer, experts, unnest(experts) AS a
    FROM decision
),

neighbour AS (
    SELECT run, layer, unnest(experts[:-2]) AS a, unnest(experts[2:]) AS b
    FROM decision
    WHERE $pairs = 'adjacent'
),

pair AS (
    SELECT run, layer, a, unnest(experts) AS b
    FROM selection
    WHERE
        CASE $pairs
            WHEN 'all' THEN TRUE
            WHEN 'adjacent' THEN FALSE
            ELSE error('coactivation: pairs is "all" or "adjacent"')
        END
    UNION ALL
    SELECT run, layer, a, a AS b
    FROM selection
    WHERE $pairs = 'adjacent'
    UNION ALL
    SELECT run, layer, least(a, b) AS a, greatest(a, b) AS b
    FROM neighbour
),

-- an expert paired with itself gives N(a)
count_of_pair AS (
    SELECT run, layer, a, b, count(*) AS n
    FROM pair
    WHERE a <= b
    GROUP BY run, layer, a, b
)

SELECT
    run,
    layer,
    p.a AS first,
    p.b AS second,
    p.n AS tokens,
    p.n / a.n AS coactivation_first,
    p.n / b.n AS coactivation_second,
    p.n * t.tokens / (a.n * b.n) AS lift
FROM count_of_pair AS p
JOIN count_of_layer AS t USING (run, layer)
JOIN count_of_pair AS a ON (a.run, a.layer, a.a, a.b) = (p.run, p.layer, p.a, p.a)
JOIN count_of_pair AS b ON (b.run, b.layer, b.a, b.b) = (p.run, p.layer, p.b, p.b)
WHERE p.a < p.b AND p.n >= $min_tokens
QUALIFY row_number() OVER (PARTITION BY run, layer ORDER BY lift DESC, first, second) <= $top
ORDER BY run, layer, lift DESC, first, second;
