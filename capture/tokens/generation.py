"""Following `generate`: when a prompt begins, and which rows end with the token just chosen."""

import functools
from typing import Any

from torch import Tensor, nn
from transformers import StoppingCriteriaList

from bhlog.capture.changes import Changes
from bhlog.capture.tokens.identity import Tracker

_CRITERIA = "_get_stopping_criteria"


class _Told(StoppingCriteriaList):
    """A generation's stopping criteria that tell the tracker what they decided."""

    def __init__(self, criteria: StoppingCriteriaList, tracker: Tracker) -> None:
        super().__init__(criteria)
        self._tracker = tracker

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        self._tracker.tokens_chosen(done)
        return done


def watch_generation(changes: Changes, model: nn.Module, tracker: Tracker) -> None:
    """Let generations of the model tell the tracker what they do.

    `generate` asks its model for the stopping criteria once, before the prompt is fed, and calls
    them after every token. What a model feeds without it, in a loop of its caller's, is text to the
    last id.
    """

    def watch(module: nn.Module, criteria: Any, generate: Any) -> None:
        @functools.wraps(criteria)
        def told_criteria(*args: Any, **kwargs: Any) -> StoppingCriteriaList:
            tracker.generation_begins()
            return _Told(criteria(*args, **kwargs), tracker)

        @functools.wraps(generate)
        def told_generate(*args: Any, **kwargs: Any) -> Any:
            try:
                return generate(*args, **kwargs)
            finally:
                tracker.generation_ends()

        changes.set(module, _CRITERIA, told_criteria)
        changes.set(module, "generate", told_generate)

    for module in model.modules():
        criteria, generate = (getattr(module, name, None) for name in (_CRITERIA, "generate"))
        if criteria is not None and generate is not None:
            watch(module, criteria, generate)
