-- loss_against_experts.sql
-- Do tokens that are hard to predict get more experts?
--
-- nll is the token's own loss, in nats: how unexpected it was when it was read. next_nll is the loss
-- of the token after it, which its experts help to predict: of the one at the next position, and NULL
-- where that one was not logged, as under --sample-every.
--
-- Reads   routing (one row per run, token and layer), tokens (one row per run and token)
-- Needs   losses
-- Param   $layer integer = NULL  only this layer
-- Returns one row per run, layer and n_selected: tokens, mean_nll, mean_next_nll; and per run and
--         layer, repeated in its rows: correlation (of nll and n_selected), next_correlation
WITH loss AS (
    SELECT
        run,
        rank,
        sequence,
        position,
        nll,
        CASE
            WHEN lead(position) OVER in_order = position + 1 THEN lead(nll) OVER in_order
        END AS next_nll
    FROM tokens
    WINDOW in_order AS (PARTITION BY run, rank, sequence ORDER BY position)
),

decision AS (
    SELECT run, layer, n_selected, nll, next_nll
    FROM routing
    JOIN loss USING (run, rank, sequence, position)
    WHERE $layer IS NULL OR layer = $layer
),

layer_correlation AS (
    SELECT
        run,
        layer,
        CASE WHEN min(n_selected) < max(n_selected) THEN corr(nll, n_selected) END AS correlation,
        CASE WHEN min(n_selected) < max(n_selected) THEN corr(next_nll, n_selected) END
            AS next_correlation
    FROM decision
    GROUP BY run, layer
)

SELECT
    run,
    layer,
    n_selected,
    count(*) AS tokens,
    avg(nll) AS mean_nll,
    avg(next_nll) AS mean_next_nll,
    any_value(correlation) AS correlation,
    any_value(next_correlation) AS next_correlation
FROM decision
JOIN layer_correlation USING (run, layer)
GROUP BY run, layer, n_selected
ORDER BY run, layer, n_selected;
