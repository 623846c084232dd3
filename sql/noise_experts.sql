-- noise_experts.sql
-- How many experts would BH take from noise?
--
-- Noise: each expert's logits shuffled over a sample of tokens, so that every expert keeps its
-- distribution and nothing is left of which expert suits which token. What the rule takes then,
-- under the same null model, it takes by chance.
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Param   $alpha number = NULL  BH level, by default the run's own, or 0.05 of a native run
-- Param   $sample integer = 1024  tokens per layer
-- Returns one row per run and layer: tokens (of the sample), mean_experts and sd_experts of them as
--         they are, noise_experts, noise_experts_se and noise_sd_experts of them shuffled
WITH token AS (
    SELECT
        run,
        layer,
        logits,
        coalesce($alpha, runs.alpha, 0.05) AS level,
        row_number() OVER in_hash_order AS place
    FROM routing
    JOIN runs USING (run)
    WINDOW in_hash_order AS (
        PARTITION BY run, layer
        ORDER BY md5(concat_ws(' ', rank, sequence, position)), rank, sequence, position
    )
    QUALIFY place <= $sample
),

logit_of_expert AS (
    SELECT run, layer, level, place, unnest(range(len(logits))) AS expert, unnest(logits) AS logit
    FROM token
),

shuffled AS (
    SELECT
        run,
        layer,
        level,
        expert,
        logit,
        row_number() OVER (
            PARTITION BY run, layer, expert ORDER BY md5(concat_ws(' ', layer, expert, place))
        ) AS place
    FROM logit_of_expert
),

noise AS (
    SELECT run, layer, level, list(logit ORDER BY expert) AS logits
    FROM shuffled
    GROUP BY run, layer, level, place
),

noise_of_layer AS (
    SELECT run, layer, avg(n) AS mean, stddev_pop(n) AS sd, count(n) AS tokens
    FROM (SELECT run, layer, bh_count(logits, layer, level, run := run) AS n FROM noise)
    GROUP BY run, layer
),

layer_as_it_is AS (
    SELECT run, layer, avg(n) AS mean, stddev_pop(n) AS sd, count(*) AS tokens
    FROM (SELECT run, layer, bh_count(logits, layer, level, run := run) AS n FROM token)
    GROUP BY run, layer
)

SELECT
    run,
    layer,
    layer_as_it_is.tokens,
    layer_as_it_is.mean AS mean_experts,
    layer_as_it_is.sd AS sd_experts,
    noise_of_layer.mean AS noise_experts,
    noise_of_layer.sd / sqrt(noise_of_layer.tokens) AS noise_experts_se,
    noise_of_layer.sd AS noise_sd_experts
FROM layer_as_it_is
JOIN noise_of_layer USING (run, layer)
ORDER BY run, layer;
