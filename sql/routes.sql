-- routes.sql
-- Where do tokens go from one layer to the next, or to any other?
--
-- A route leads from a token's first choice in a layer to its first choice in the next layer that
-- has a router, or in next_layer. share = P(next | expert); lift = share / P(next): 1 means that the
-- next expert does not depend on this one. The conditional probability is the inter-layer expert
-- affinity of Yao et al. (2024), Exploiting inter-layer expert affinity, arXiv:2401.08383.
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Param   $min_tokens integer = 10  leave out routes that fewer tokens take
-- Param   $layer integer = NULL  only from this layer, by default from each one before next_layer
-- Param   $next_layer integer = NULL  to this layer, by default to the next one
-- Param   $top integer = 10  at most this many routes per run and layer, by falling tokens
-- Returns one row per run, layer and route: next_layer, expert, next_expert, tokens, share, lift
WITH layer_with_next AS (
    SELECT run, layer, coalesce($next_layer, following) AS next_layer
    FROM (
        SELECT run, layer, lead(layer) OVER (PARTITION BY run ORDER BY layer) AS following
        FROM (SELECT run, unnest(layers) AS layer FROM runs)
    )
    WHERE layer = coalesce($layer, layer) AND ($layer IS NOT NULL OR layer < next_layer)
),

choice AS (
    SELECT run, layer, rank, sequence, position, experts[1] AS expert
    FROM routing
    WHERE n_selected > 0
),

route AS (
    SELECT a.run, a.layer, b.layer AS next_layer, a.expert, b.expert AS next_expert, count(*) AS n
    FROM choice AS a
    JOIN layer_with_next AS l ON (a.run, a.layer) = (l.run, l.layer)
    JOIN choice AS b
        ON (b.run, b.layer, b.rank, b.sequence, b.position)
        = (a.run, l.next_layer, a.rank, a.sequence, a.position)
    GROUP BY ALL
)

SELECT
    run,
    layer,
    next_layer,
    expert,
    next_expert,
    n AS tokens,
    n / sum(n) OVER (PARTITION BY run, layer, expert) AS share,
    n * sum(n) OVER (PARTITION BY run, layer)
    / (
        sum(n) OVER (PARTITION BY run, layer, expert)
        * sum(n) OVER (PARTITION BY run, layer, next_expert)
    ) AS lift
FROM route
QUALIFY
    n >= $min_tokens
    AND row_number() OVER (
        PARTITION BY run, layer ORDER BY n DESC, expert, next_expert
    ) <= $top
ORDER BY run, layer, tokens DESC, expert, next_expert;
