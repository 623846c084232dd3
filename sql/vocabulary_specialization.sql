-- vocabulary_specialization.sql
-- Which tokens of the vocabulary belong to which experts?
--
-- Vocabulary specialization (E, x) = N(x, E) / N(x): N(x) tokens have the id x, N(x, E) of them have
-- expert E among their first k choices. Muennighoff et al. (2024), OLMoE, section 5.4, for the ids
-- that go in.
--
-- Reads   routing (one row per run, token and layer)
-- Needs   token ids
-- Param   $k integer = 1  only the first k choices count
-- Param   $layer integer = NULL  only this layer
-- Param   $min_tokens integer = 10  leave out ids that fewer tokens have
-- Param   $top integer = 3  at most this many ids per expert, by falling specialization
-- Returns one row per run, layer, expert and token_id: tokens N(x), specialization
WITH decision AS (
    SELECT run, layer, token_id, experts[1:$k] AS experts
    FROM routing
    WHERE token_id IS NOT NULL AND ($layer IS NULL OR layer = $layer)
),

vocabulary AS (
    SELECT run, layer, token_id, count(*) AS n
    FROM decision
    GROUP BY run, layer, token_id
    HAVING n >= $min_tokens
),

count_of_expert AS (
    SELECT run, layer, token_id, expert, count(*) AS n
    FROM (SELECT run, layer, token_id, unnest(experts) AS expert FROM decision)
    GROUP BY run, layer, token_id, expert
)

SELECT
    run,
    layer,
    expert,
    token_id,
    v.n AS tokens,
    c.n / v.n AS specialization
FROM count_of_expert AS c
JOIN vocabulary AS v USING (run, layer, token_id)
QUALIFY row_number() OVER (
    PARTITION BY run, layer, expert ORDER BY c.n / v.n DESC, v.n DESC, token_id
) <= $top
ORDER BY run, layer, expert, specialization DESC, tokens DESC, token_id;
