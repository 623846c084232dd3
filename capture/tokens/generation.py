"""Following `generate`: when a prompt begins, and which rows end with the token just chosen."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import StoppingCriteriaList

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


def watch_generation(model: nn.Module, tracker: Tracker) -> list[Callable[[], None]]:
    """Let generations of the model tell the tracker what they do; returns what undoes it.

    `generate` asks its model for the stopping criteria once, before the prompt is fed, and calls
    them after every token. Where a model has no such method, ends of sequences are known by the
    ids in its configuration alone.
    """
    undo: list[Callable[[], None]] = []

    def replace(module: nn.Module, name: str, method: Any, told: Any) -> None:
        own = vars(module).get(name)
        vars(module)[name] = functools.wraps(method)(told)

        def restore() -> None:
            if own is None:
                del vars(module)[name]
            else:
                vars(module)[name] = own

        undo.append(restore)

    def watch(module: nn.Module, criteria: Any, generate: Any) -> None:
        def told_criteria(*args: Any, **kwargs: Any) -> StoppingCriteriaList:
            tracker.generation_begins()
            return _Told(criteria(*args, **kwargs), tracker)

        def told_generate(*args: Any, **kwargs: Any) -> Any:
            try:
                return generate(*args, **kwargs)
            finally:
                tracker.generation_ends()

        replace(module, _CRITERIA, criteria, told_criteria)
        replace(module, "generate", generate, told_generate)

    for module in model.modules():
        criteria, generate = (getattr(module, name, None) for name in (_CRITERIA, "generate"))
        if criteria is not None and generate is not None:
            watch(module, criteria, generate)
    return undo
