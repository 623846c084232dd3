"""Following `generate`: when a prompt begins, and which rows end with the token just chosen."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import StoppingCriteriaList

from capture.tokens.identity import Tracker

_METHOD = "_get_stopping_criteria"


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
    for module in model.modules():
        method = getattr(module, _METHOD, None)
        if method is None:
            continue

        def told(*args: Any, _method: Any = method, **kwargs: Any) -> StoppingCriteriaList:
            tracker.generation_begins()
            return _Told(_method(*args, **kwargs), tracker)

        own = vars(module).get(_METHOD)
        vars(module)[_METHOD] = told

        def restore(module: nn.Module = module, own: Any = own) -> None:
            if own is None:
                del vars(module)[_METHOD]
            else:
                vars(module)[_METHOD] = own

        undo.append(restore)
    return undo
