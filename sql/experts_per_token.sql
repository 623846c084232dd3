-- experts_per_token.sql
-- How many experts does a token get, layer by layer?
--
-- Reads   routing (one row per run, token and layer)
-- Param   $phase text = NULL  only "prefill" or only "decode"
-- Returns one row per run and layer: tokens, mean_experts in experts per token, sd_experts,
--         min_experts, median_experts, max_experts
SELECT
    run,
    layer,
    count(*) AS tokens,
    avg(n_selected) AS mean_experts,
    stddev_pop(n_selected) AS sd_experts,
    min(n_selected) AS min_experts,
    quantile_disc(n_selected, 0.5) AS median_experts,
    max(n_selected) AS max_experts
FROM routing
WHERE $phase IS NULL OR phase = $phase
GROUP BY run, layer
ORDER BY run, layer;
