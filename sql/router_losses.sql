-- router_losses.sql
-- What would the router's training losses be on this text?
--
-- load_balancing_loss = E sum_i f_i P_i, with f_i the share of the selections that expert i got and
-- P_i the mean softmax probability of expert i, over a batch of tokens: 1 where both are even, E
-- where one expert takes all. Fedus et al. (2022), Switch Transformers, eq. (4) to (6); with several
-- experts a token, f_i sums to 1 as in OLMoE's training, and is what transformers reports over k.
-- z_loss = mean over tokens of (ln sum_i exp(l_i))^2. Zoph et al. (2022), ST-MoE, eq. (5). Logits
-- that are not finite have no probability and no part in z_loss.
--
-- Reads   routing (one row per run, token and layer)
-- Param   $phase text = NULL  only "prefill" or only "decode"
-- Param   $layer integer = NULL  only this layer
-- Returns one row per run and layer: tokens, load_balancing_loss (all tokens as one batch),
--         load_balancing_loss_by_forward (each forward a batch: their mean by tokens), z_loss
WITH decision AS (
    SELECT run, layer, rank, forward, experts, logits
    FROM routing
    WHERE ($phase IS NULL OR phase = $phase) AND ($layer IS NULL OR layer = $layer)
),

mass_of_expert AS (
    SELECT run, layer, rank, forward, expert, sum(p) AS p
    FROM (
        SELECT
            run,
            layer,
            rank,
            forward,
            unnest(softmax(logits)) AS p,
            unnest(range(len(logits))) AS expert
        FROM decision
    )
    GROUP BY run, layer, rank, forward, expert
),

count_of_expert AS (
    SELECT run, layer, rank, forward, expert, count(*) AS n
    FROM (SELECT run, layer, rank, forward, unnest(experts) AS expert FROM decision)
    GROUP BY run, layer, rank, forward, expert
),

expert AS (
    SELECT run, layer, rank, forward, expert, p, coalesce(n, 0) AS n
    FROM mass_of_expert
    LEFT JOIN count_of_expert USING (run, layer, rank, forward, expert)
),

forward_loss AS (
    SELECT run, layer, sum(p) AS weight, count(*) * sum(n * p) / (sum(n) * sum(p)) AS loss
    FROM expert
    GROUP BY run, layer, rank, forward
),

layer_loss AS (
    SELECT run, layer, count(*) * sum(n * p) / (sum(n) * sum(p)) AS loss
    FROM (
        SELECT run, layer, expert, sum(n) AS n, sum(p) AS p
        FROM expert
        GROUP BY run, layer, expert
    )
    GROUP BY run, layer
),

by_forward AS (
    SELECT run, layer, sum(weight * loss) / sum(weight) FILTER (WHERE loss IS NOT NULL) AS loss
    FROM forward_loss
    GROUP BY run, layer
),

-- p_i = exp(l_i) / sum, so that ln sum = l_i - ln p_i, taken where p_i is largest
z AS (
    SELECT
        run,
        layer,
        count(*) AS tokens,
        avg((logits[list_position(p, largest)] - ln(nullif(largest, 0)::DOUBLE)) ** 2) AS z_loss
    FROM (
        SELECT run, layer, logits, p, list_max(p) AS largest
        FROM (SELECT run, layer, logits, softmax(logits) AS p FROM decision)
    )
    GROUP BY run, layer
)

SELECT
    run,
    layer,
    tokens,
    layer_loss.loss AS load_balancing_loss,
    by_forward.loss AS load_balancing_loss_by_forward,
    z_loss
FROM z
LEFT JOIN layer_loss USING (run, layer)
LEFT JOIN by_forward USING (run, layer)
ORDER BY run, layer;
