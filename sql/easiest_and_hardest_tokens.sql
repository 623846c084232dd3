-- easiest_and_hardest_tokens.sql
-- Which tokens get the most experts and which the fewest, and what stands around them?
--
-- before and after end where a neighbour was not logged, as under --sample-every.
--
-- Reads   routing (one row per run, token and layer), tokens (one row per run and token)
-- Needs   token ids
-- Param   $top integer = 10  this many of each kind per run
-- Param   $around integer = 3  neighbours on either side
-- Returns one row per run and token, the hardest first: kind ("most" or "fewest"), mean_experts over
--         the layers, rank, sequence, position, token_id, its text, before and after (token ids),
--         around (the text of all of them; NULL like text without a tokenizer), nll
WITH token AS (
    SELECT run, rank, sequence, position, avg(n_selected) AS mean_experts
    FROM routing
    GROUP BY run, rank, sequence, position
),

extreme AS (
    SELECT *, 'most' AS kind
    FROM token
    QUALIFY row_number() OVER (
        PARTITION BY run ORDER BY mean_experts DESC, rank, sequence, position
    ) <= $top
    UNION ALL
    SELECT *, 'fewest' AS kind
    FROM token
    QUALIFY row_number() OVER (
        PARTITION BY run ORDER BY mean_experts, rank, sequence, position
    ) <= $top
),

numbered AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY run, rank, sequence ORDER BY position) AS number
    FROM tokens
    SEMI JOIN extreme USING (run, rank, sequence)
),

placed AS (
    SELECT e.*, number
    FROM extreme AS e
    JOIN numbered USING (run, rank, sequence, position)
),

neighbour AS (
    SELECT
        e.run,
        e.rank,
        e.sequence,
        e.position,
        e.kind,
        list(t.token_id ORDER BY t.position) FILTER (WHERE t.position < e.position) AS before,
        list(t.token_id ORDER BY t.position) FILTER (WHERE t.position > e.position) AS after,
        any_value(t.token_id) FILTER (WHERE t.position = e.position) AS token_id,
        string_agg(token_text(t.token_id), '' ORDER BY t.position) AS around,
        any_value(t.nll) FILTER (WHERE t.position = e.position) AS nll
    FROM placed AS e
    JOIN numbered AS t
        ON (t.run, t.rank, t.sequence) = (e.run, e.rank, e.sequence)
        AND t.number BETWEEN e.number - $around::BIGINT AND e.number + $around::BIGINT
        AND t.number - e.number = t.position::BIGINT - e.position::BIGINT
    GROUP BY ALL
)

SELECT
    run,
    kind,
    mean_experts,
    rank,
    sequence,
    position,
    token_id,
    token_text(token_id) AS text,
    before,
    after,
    around,
    nll
FROM extreme
JOIN neighbour USING (run, rank, sequence, position, kind)
ORDER BY run, kind DESC, CASE kind WHEN 'most' THEN -mean_experts ELSE mean_experts END,
    rank, sequence, position;
