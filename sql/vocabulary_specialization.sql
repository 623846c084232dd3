-- vocabulary_specialization.sql
-- Which tokens of the vocabulary belong to which experts?
--
-- Vocabulary specialization (E, x) = N(x, E) / N(x): N(x) tokens have the id x, N(x, E) of them have
-- expert E among their first k choices. Muennighoff et al. (2024), OLMoE, section 5.4. ids=input takes
-- a token's own id; ids=next the ground truth, the id of the token at the next position, where that
-- one was logged (not of the last of a sequence, nor under --sample-every). The paper's third kind,
-- the id that the model predicted, is not in a log. average is the paper's figure of a layer: the
-- mean over ids of the largest specialization; it takes every id, as min_tokens=1 does here.
--
-- Reads   routing (one row per run, token and layer), tokens (one row per run and token)
-- Needs   token ids
-- Param   $ids text = input  of which token: "input", or "next"
-- Param   $k integer = 1  only the first k choices count
-- Param   $layer integer = NULL  only this layer
-- Param   $min_tokens integer = 10  leave out ids that fewer tokens have
-- Param   $top integer = 3  at most this many ids per expert, by falling specialization
-- Returns one row per run, layer, expert and token_id: tokens N(x), specialization; and per run and
--         layer, repeated in its rows: average
WITH next_token AS (
    SELECT
        run,
        rank,
        sequence,
        position,
        CASE
            WHEN lead(position) OVER in_order = position + 1 THEN lead(token_id) OVER in_order
        END AS token_id
    FROM tokens
    WINDOW in_order AS (PARTITION BY run, rank, sequence ORDER BY position)
),

decision AS (
    SELECT run, layer, token_id, experts[1:$k] AS experts
    FROM routing
    WHERE
        token_id IS NOT NULL
        AND ($layer IS NULL OR layer = $layer)
        AND CASE
            WHEN $ids IN ('input', 'next') THEN $ids = 'input'
            ELSE error('vocabulary_specialization: ids is "input" or "next"')
        END
    UNION ALL
    SELECT run, layer, n.token_id, experts[1:$k] AS experts
    FROM routing
    JOIN next_token AS n USING (run, rank, sequence, position)
    WHERE n.token_id IS NOT NULL AND ($layer IS NULL OR layer = $layer) AND $ids = 'next'
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
),

specialized AS (
    SELECT run, layer, expert, token_id, v.n AS tokens, c.n / v.n AS specialization
    FROM count_of_expert AS c
    JOIN vocabulary AS v USING (run, layer, token_id)
),

layer_average AS (
    SELECT run, layer, avg(largest) AS average
    FROM (
        SELECT run, layer, token_id, max(specialization) AS largest
        FROM specialized
        GROUP BY run, layer, token_id
    )
    GROUP BY run, layer
)

SELECT
    run,
    layer,
    expert,
    token_id,
    tokens,
    specialization,
    average
FROM specialized
JOIN layer_average USING (run, layer)
QUALIFY row_number() OVER (
    PARTITION BY run, layer, expert ORDER BY specialization DESC, tokens DESC, token_id
) <= $top
ORDER BY run, layer, expert, specialization DESC, tokens DESC, token_id;
