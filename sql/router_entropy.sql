-- router_entropy.sql
-- How sure is the router, layer by layer?
--
-- p = softmax(logits) over all E experts; entropy = -sum(p ln p), in nats, and 0 for a router that
-- always puts all weight on one expert, ln E for one that does not choose.
--
-- Reads   routing (one row per run, token and layer), runs (one row per run)
-- Returns one row per run and layer: tokens, mean_entropy, relative_entropy (mean_entropy / ln E),
--         mean_top_probability (of the largest p)
SELECT
    run,
    layer,
    count(*) AS tokens,
    avg(router_entropy(logits)) AS mean_entropy,
    avg(router_entropy(logits)) / ln(any_value(n_experts)) AS relative_entropy,
    avg(top_probability(logits)) AS mean_top_probability
FROM routing
JOIN runs USING (run)
GROUP BY run, layer
ORDER BY run, layer;
