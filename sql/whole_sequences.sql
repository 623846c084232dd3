-- whole_sequences.sql
-- What did each sequence read from its first token on, across the forks of beams?
--
-- A fork is logged from where it leaves its parent: what comes before is in the parent's rows, and in
-- its parent's. A sequence that beam search returned begins one of these.
--
-- Reads   tokens (one row per run and token)
-- Param   $sequence integer = NULL  only this sequence
-- Param   $rank integer = NULL  only this process
-- Returns one row per run, rank, sequence and position, in reading order: token_id, nll,
--         logged_as (the sequence whose row it is)
WITH RECURSIVE logged AS (
    SELECT run, rank, sequence, min(position) AS first, any_value(parent) AS parent
    FROM tokens
    GROUP BY run, rank, sequence
),
pieces AS (
    SELECT run, rank, sequence, sequence AS logged_as, first, parent, NULL::UBIGINT AS until
    FROM logged
    WHERE
        ($sequence IS NULL OR sequence = $sequence)
        AND ($rank IS NULL OR rank = $rank)
    UNION ALL
    SELECT
        p.run,
        p.rank,
        p.sequence,
        l.sequence AS logged_as,
        l.first,
        l.parent,
        least(p.until, p.first) AS until
    FROM pieces AS p
    JOIN logged AS l ON l.run = p.run AND l.rank = p.rank AND l.sequence = p.parent
)
SELECT
    p.run,
    p.rank,
    p.sequence,
    t.position,
    t.token_id,
    t.nll,
    p.logged_as
FROM pieces AS p
JOIN tokens AS t
    ON t.run = p.run
    AND t.rank = p.rank
    AND t.sequence = p.logged_as
    AND (p.until IS NULL OR t.position < p.until)
ORDER BY p.run, p.rank, p.sequence, t.position;
