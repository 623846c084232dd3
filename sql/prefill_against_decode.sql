-- prefill_against_decode.sql
-- Does routing differ between reading a prompt and generating?
--
-- load_distance is the total variation distance between the shares of selections that the experts
-- get in the two phases: 0 when they are equal, 1 when no expert serves both.
--
-- Reads   routing (one row per run, token and layer)
-- Returns one row per run and layer: prefill_tokens, decode_tokens, prefill_experts and
--         decode_experts (mean experts per token), load_distance (NULL without both phases)
WITH selection AS (
    SELECT run, layer, phase, unnest(experts) AS expert
    FROM routing
),

count_of_expert AS (
    SELECT
        run,
        layer,
        expert,
        count(*) FILTER (WHERE phase = 'prefill') AS in_prefill,
        count(*) FILTER (WHERE phase = 'decode') AS in_decode
    FROM selection
    GROUP BY run, layer, expert
),

load AS (
    SELECT
        run,
        layer,
        in_prefill / nullif(sum(in_prefill) OVER (PARTITION BY run, layer), 0) AS in_prefill,
        in_decode / nullif(sum(in_decode) OVER (PARTITION BY run, layer), 0) AS in_decode
    FROM count_of_expert
),

distance AS (
    SELECT run, layer, sum(abs(in_prefill - in_decode)) / 2 AS load_distance
    FROM load
    GROUP BY run, layer
)

SELECT
    run,
    layer,
    count(*) FILTER (WHERE phase = 'prefill') AS prefill_tokens,
    count(*) FILTER (WHERE phase = 'decode') AS decode_tokens,
    avg(n_selected) FILTER (WHERE phase = 'prefill') AS prefill_experts,
    avg(n_selected) FILTER (WHERE phase = 'decode') AS decode_experts,
    any_value(load_distance) AS load_distance
FROM routing
LEFT JOIN distance USING (run, layer)
GROUP BY run, layer
ORDER BY run, layer;
