-- probability_against_loss.sql
-- How well does the probability that routing keeps rank runs by their loss?
--
-- A run keeps of each token the softmax probability of the experts that it used, by its own logits.
-- Open a native run and reruns of its text by several policies.
--
-- Reads   routing (one row per run, token and layer), tokens (one row per run and token),
--         runs (one row per run)
-- Needs   losses
-- Returns one row per run, by falling probability: policy (NULL: native), mean_experts,
--         probability_kept (means over tokens and layers), loss (mean nll in nats), loss_rank (1:
--         the lowest), and repeated in all rows: pairs_in_order (share of pairs of runs in which the
--         one that keeps more loses less; 0.5 is chance, NULL for one run)
WITH kept_by_run AS (
    SELECT
        run,
        avg(n_selected) AS mean_experts,
        avg(list_sum(list_transform(experts, lambda e: weight[e + 1]))) AS probability_kept
    FROM (SELECT run, n_selected, experts, softmax(logits) AS weight FROM routing)
    GROUP BY run
),

loss_by_run AS (
    SELECT run, avg(nll) AS loss
    FROM tokens
    GROUP BY run
),

measured AS (
    SELECT run, mean_experts, probability_kept, loss
    FROM kept_by_run
    JOIN loss_by_run USING (run)
),

agreement AS (
    SELECT avg((a.loss < b.loss)::INTEGER) AS pairs_in_order
    FROM measured AS a
    JOIN measured AS b ON a.probability_kept > b.probability_kept
)

SELECT
    run,
    policy,
    mean_experts,
    probability_kept,
    loss,
    rank() OVER (ORDER BY loss) AS loss_rank,
    pairs_in_order
FROM measured
JOIN runs USING (run)
CROSS JOIN agreement
ORDER BY probability_kept DESC, run;
