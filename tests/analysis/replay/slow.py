"""The policies as the papers write them, one row at a time in plain Python: what fast ones must be.

A row is a list of E logits, p its list of p-values. Where a rule compares sums or products that a
fast implementation may round otherwise, it takes `slack`: a relative change of what it compares
with. The right count lies between those at slack -1e-12 and +1e-12.
"""

import math
import struct


def finite(row):
    return [i for i, logit in enumerate(row) if math.isfinite(logit)]


def softmax(row):
    """Probabilities of all experts; 0 where the logit is not finite."""
    top = max(row[i] for i in finite(row))
    weights = [math.exp(x - top) if math.isfinite(x) else 0.0 for x in row]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def by_logit(row):
    """Experts by falling logit, ties to the lower index, those that are not finite last."""
    keys = [x if math.isfinite(x) else -math.inf for x in row]
    return sorted(range(len(row)), key=lambda i: (-keys[i], i))


def by_p(row, p):
    """Experts by rising p-value, ties to the larger logit, then to the lower index."""
    place = {expert: at for at, expert in enumerate(by_logit(row))}
    keys = [p[i] if math.isfinite(row[i]) else math.inf for i in range(len(row))]
    return sorted(range(len(row)), key=lambda i: (keys[i], place[i]))


def sorted_p(row, p):
    return sorted(p[i] if math.isfinite(row[i]) else math.inf for i in range(len(row)))


def step_up(p, critical):
    """The largest k whose p_(k) is at most critical(k), 0 if there is none."""
    return max((k for k in range(1, len(p) + 1) if p[k - 1] <= critical(k)), default=0)


def bh(row, p, alpha, slack=0.0):
    E = len(row)
    return step_up(sorted_p(row, p), lambda k: k * alpha / E * (1 + slack))


def by(row, p, alpha, slack=0.0):
    harmonic = math.fsum(1 / i for i in range(1, len(row) + 1))
    return bh(row, p, alpha / harmonic, slack)


def storey(row, p, alpha, lambda_, slack=0.0):
    E = len(row)
    above = sum(value > lambda_ for value in sorted_p(row, p))
    pi0 = min(1.0, (1 + above) / ((1 - lambda_) * E))
    return step_up(sorted_p(row, p), lambda k: k * alpha / (E * pi0) * (1 + slack))


def higher_criticism(row, p, beta, *, plus=False):
    """Every rank whose score is largest but for rounding; {0} if none is above 0."""
    E, scores = len(row), {}
    for k, value in enumerate(sorted_p(row, p), start=1):
        if not math.isfinite(value) or (plus and value <= 1 / E):
            continue
        if k > 1 and k > beta * E * (1 + 1e-12):
            continue
        if value == 0:
            scores[k] = math.inf, k
        elif value < 1:
            scores[k] = math.sqrt(E) * (k / E - value) / math.sqrt(value * (1 - value)), 0
    best = max(scores.values(), default=(0.0, 0))
    if best[0] <= 0:
        return {0}
    return {
        k
        for k, (score, infinite) in scores.items()
        if infinite == best[1] and (score == best[0] or score >= best[0] * (1 - 1e-9))
    }


def top_p(row, p, slack=0.0):
    probability, total = softmax(row), 0.0
    for k, expert in enumerate(by_logit(row)[: len(finite(row))], start=1):
        total += probability[expert]
        if total >= p * (1 + slack):
            return k
    return len(finite(row))


def threshold(row, q, slack=0.0):
    return sum(value >= q * (1 + slack) for value in softmax(row))


def entropy(row, k, slack=0.0):
    share = -math.fsum(q * math.log(q) for q in softmax(row) if q > 0) / math.log(len(row))
    return min(len(row), math.ceil(k), max(1, math.ceil(k * share - k * slack)))


def seq_top_k(rows, k):
    """Experts of each row of a pool: those with the round(k T) largest probabilities."""
    ranked = sorted(
        (-q, i)
        for i, row in enumerate(rows)
        for q in (softmax(row) if finite(row) else [0.0] * len(row))
    )
    taken = [i for _, i in ranked[: round(k * len(rows))]]
    return [taken.count(i) for i in range(len(rows))]


def float32(x):
    """The nearest float32; that of a sum of two float32 is right, as float64 has room for both."""
    return struct.unpack("f", struct.pack("f", x))[0]


def min_p(row, t):
    """How many logits reach the largest one plus ln t, each step in float32."""
    cut = float32(max(row[i] for i in finite(row)) + float32(math.log(t)))
    return sum(row[i] >= cut for i in finite(row))


def min_p_of_probabilities(row, t, slack=0.0):
    probability = softmax(row)
    return sum(q >= t * max(probability) * (1 + slack) for q in probability if q > 0)
