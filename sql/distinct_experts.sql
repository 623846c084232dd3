-- distinct_experts.sql
-- How many different experts does a forward touch, by layer and by how many tokens it holds?
--
-- The weights of every expert that any token of a forward selects must be read: at a batch of one
-- that is n_selected, at a large one often all of them. tokens counts the forward's logged tokens in
-- the layer; share is distinct experts over the layer's experts; independent is what tokens that
-- choose independently, each expert as often as the whole run does, would touch.
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Param   $phase text = NULL  only "prefill" or only "decode"
-- Param   $layer integer = NULL  only this layer
-- Returns one row per run, layer and tokens in a forward: forwards, mean_distinct, min_distinct,
--         max_distinct, share, independent
WITH decision AS (
    SELECT run, layer, rank, forward, experts
    FROM routing
    WHERE ($phase IS NULL OR phase = $phase) AND ($layer IS NULL OR layer = $layer)
),

tokens_of_forward AS (
    SELECT run, layer, rank, forward, count(*) AS tokens
    FROM decision
    GROUP BY run, layer, rank, forward
),

selection AS (
    SELECT run, layer, rank, forward, unnest(experts) AS expert
    FROM decision
),

distinct_of_forward AS (
    SELECT run, layer, rank, forward, count(DISTINCT expert) AS n
    FROM selection
    GROUP BY run, layer, rank, forward
),

count_of_layer AS (
    SELECT run, layer, sum(tokens) AS tokens
    FROM tokens_of_forward
    GROUP BY run, layer
),

share_of_expert AS (
    SELECT run, layer, expert, count(*) / any_value(tokens) AS p
    FROM selection
    JOIN count_of_layer USING (run, layer)
    GROUP BY run, layer, expert
),

size AS (
    SELECT DISTINCT run, layer, tokens
    FROM tokens_of_forward
),

independent AS (
    SELECT run, layer, tokens, sum(1 - (1 - p) ** tokens) AS independent
    FROM size
    JOIN share_of_expert USING (run, layer)
    GROUP BY run, layer, tokens
)

SELECT
    run,
    layer,
    tokens,
    count(*) AS forwards,
    avg(coalesce(n, 0)) AS mean_distinct,
    min(coalesce(n, 0)) AS min_distinct,
    max(coalesce(n, 0)) AS max_distinct,
    avg(coalesce(n, 0)) / any_value(n_experts) AS share,
    coalesce(any_value(independent), 0) AS independent
FROM tokens_of_forward
JOIN (SELECT run, n_experts FROM runs) AS opened USING (run)
LEFT JOIN distinct_of_forward USING (run, layer, rank, forward)
LEFT JOIN independent USING (run, layer, tokens)
GROUP BY run, layer, tokens
ORDER BY run, layer, tokens;
