-- load_balance.sql
-- How evenly are a layer's experts used?
--
-- With f the share of a layer's selections that each of E experts gets:
-- balance = -sum(f ln f) / ln E (1 is even), cv = standard deviation of f / mean of f,
-- max_load = max f * E, gini = sum over pairs |f_i - f_j| / (2 E).
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Returns one row per run and layer: n_experts, unused (experts never selected), balance, cv,
--         max_load, gini (0 is even)
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

share AS (
    SELECT
        run,
        layer,
        coalesce(n, 0) / sum(n) OVER (PARTITION BY run, layer) AS f,
        row_number() OVER (PARTITION BY run, layer ORDER BY coalesce(n, 0)) AS ascending
    FROM expert
    LEFT JOIN count_of_expert USING (run, layer, expert)
)

SELECT
    run,
    layer,
    count(*) AS n_experts,
    count(*) FILTER (WHERE f = 0) AS unused,
    -sum(CASE WHEN f > 0 THEN f * ln(f) ELSE 0 END) / ln(count(*)) AS balance,
    stddev_pop(f) / avg(f) AS cv,
    max(f) * count(*) AS max_load,
    sum((2 * ascending - count_of_layer.n_experts - 1) * f) / count(*) AS gini
FROM share
JOIN (SELECT run, n_experts FROM runs) AS count_of_layer USING (run)
WHERE f IS NOT NULL
GROUP BY run, layer
ORDER BY run, layer;
