"""How the page's events are answered: one at a time, and mistakes as a sentence on the page."""

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from flatdepth.errors import BadFrame, UserError, is_out_of_memory


def listen(
    triggers: Sequence[Any],
    answer: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *,
    lane: str = "compute",
    **options: Any,
) -> None:
    """Call ``answer`` for events; of those that wait for it only the last one is kept.

    Args:
        lane: what is of one lane runs one at a time, for all who look at the page.
        options: as Gradio takes them.
    """
    gr.on(
        list(triggers),
        in_a_sentence(answer),
        list(inputs),
        list(outputs),
        concurrency_limit=1,
        concurrency_id=lane,
        trigger_mode="always_last",
        api_visibility="private",
        **{"show_progress": "minimal"} | options,
    )


def in_a_sentence(answer: Callable[..., Any]) -> Callable[..., Any]:
    """``answer``, with what goes wrong as a message; a bug's traceback is in the terminal."""

    @functools.wraps(answer)
    def guarded(*arguments: Any) -> Any:
        try:
            return answer(*arguments)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(_sentence(error), print_exception=False) from error

    return guarded


def _sentence(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BadFrame):
        return error.detail or error.reason
    if is_out_of_memory(error):
        return "memory is full; take a smaller size"
    traceback.print_exception(error, file=sys.stderr)
    return "an error; it is in the terminal"
