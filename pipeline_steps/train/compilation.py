"""torch.compile with a fallback: a network that cannot be compiled runs eagerly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

log = logging.getLogger(__name__)


def inductor_or_eager(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Backend of torch.compile: inductor, or the graph itself when inductor fails (no C++ compiler, unsupported GPU)."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any
    try:
        compiled = compile_fx(graph, list(inputs))
    except Exception as error:  # any error of the compiler; an error of the network appears in eager mode again
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        log.warning("torch.compile failed, training continues without it: %s: %s", type(error).__name__, reason)
        compiled = graph.forward
    return cast("Callable[..., Any]", compiled)
