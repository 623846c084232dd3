-- experts_by_source.sql
-- Which experts prefer one source of text over another, such as code over docs?
--
-- share(e, s) = P(expert e is among a token's experts | the token is from source s). preference is
-- share_first - share_second: above 0 the expert prefers the first source, below 0 the second. lift
-- is share_first / share_second. Both sides are shown: of each pair of sources and of each side the
-- strongest.
--
-- Reads   routing (one row per run, token and layer), tokens (one row per run and token), runs
-- Needs   sources
-- Param   $first text = NULL  compare this source, by default each one
-- Param   $second text = NULL  with this one, by default each other one
-- Param   $layer integer = NULL  only this layer
-- Param   $top integer = 10  at most this many experts per run, pair and preferred source
-- Returns one row per run, pair of sources, layer and expert that has a preference, those of the
--         first source first and the strongest first: prefers (a source), share_first and
--         share_second of tokens, preference, their standard errors share_first_se, share_second_se
--         and preference_se, lift (NULL where share_second is 0)
WITH text_of_source AS (
    SELECT run, source, rank, sequence, count(*) AS x
    FROM tokens
    WHERE source IS NOT NULL
    GROUP BY run, source, rank, sequence
),

source AS (
    SELECT run, source, sum(x) AS n_tokens, sum(x * x) AS xx, count(*) AS texts
    FROM text_of_source
    GROUP BY run, source
),

selection AS (
    SELECT run, source, rank, sequence, layer, unnest(experts) AS expert
    FROM routing
    JOIN tokens USING (run, rank, sequence, position)
    WHERE source IS NOT NULL AND ($layer IS NULL OR layer = $layer)
),

count_of_text AS (
    SELECT run, source, rank, sequence, layer, expert, count(*) AS y
    FROM selection
    GROUP BY run, source, rank, sequence, layer, expert
),

count_of_expert AS (
    SELECT run, source, layer, expert, sum(y) AS n, sum(y * y) AS yy, sum(y * x) AS yx
    FROM count_of_text
    JOIN text_of_source USING (run, source, rank, sequence)
    GROUP BY run, source, layer, expert
),

expert AS (
    SELECT run, layer, unnest(range(n_experts)) AS expert
    FROM (SELECT run, n_experts, unnest(layers) AS layer FROM runs)
    WHERE $layer IS NULL OR layer = $layer
),

share AS (
    SELECT
        run,
        source,
        layer,
        expert,
        coalesce(n, 0) / n_tokens AS share,
        -- whole numbers: n_tokens^2 times the sum over texts of (y - share * x)^2
        n_tokens * n_tokens * coalesce(yy, 0) - 2 * n_tokens * coalesce(n * yx, 0)
        + coalesce(n * n, 0) * xx AS squares,
        sqrt(texts / nullif(texts - 1, 0) * squares) / n_tokens / n_tokens AS se
    FROM expert
    JOIN source USING (run)
    LEFT JOIN count_of_expert USING (run, source, layer, expert)
)

SELECT
    a.run,
    a.source AS first,
    b.source AS second,
    layer,
    expert,
    CASE WHEN a.share > b.share THEN a.source ELSE b.source END AS prefers,
    a.share AS share_first,
    a.se AS share_first_se,
    b.share AS share_second,
    b.se AS share_second_se,
    a.share - b.share AS preference,
    sqrt(a.se * a.se + b.se * b.se) AS preference_se,
    a.share / nullif(b.share, 0) AS lift
FROM share AS a
JOIN share AS b USING (run, layer, expert)
WHERE
    a.source <> b.source
    AND a.share <> b.share
    AND ($first IS NOT NULL OR $second IS NOT NULL OR a.source < b.source)
    AND a.source = coalesce($first, a.source)
    AND b.source = coalesce($second, b.source)
QUALIFY row_number() OVER (
    PARTITION BY a.run, a.source, b.source, a.share > b.share
    ORDER BY abs(a.share - b.share) DESC, layer, expert
) <= $top
ORDER BY run, first, second, preference < 0, abs(preference) DESC, layer, expert;
