-- trace_sequence.sql
-- What did the router do with one sequence, token by token?
--
-- Reads   routing (one row per run, token and layer), tokens (one row per run and token)
-- Param   $sequence integer = 0  which sequence
-- Param   $rank integer = 0  of which process
-- Param   $layer integer = NULL  only this layer
-- Param   $from integer = 0  first position
-- Param   $to integer = NULL  last position
-- Returns one row per run, token and layer, in reading order: position, token_id, phase, nll, layer,
--         n_selected, n_rejected, experts by falling logit, weights
SELECT
    run,
    position,
    r.token_id,
    r.phase,
    t.nll,
    layer,
    n_selected,
    n_rejected,
    experts,
    weights
FROM routing AS r
JOIN tokens AS t USING (run, rank, sequence, position)
WHERE
    sequence = $sequence
    AND rank = $rank
    AND ($layer IS NULL OR layer = $layer)
    AND position >= $from
    AND ($to IS NULL OR position <= $to)
ORDER BY run, position, layer;
