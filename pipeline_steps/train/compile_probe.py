"""torch.compile where it pays: decided by timing the real step on the real device, not by belief."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from pipeline_steps.train.data import TrainingBatch
from pipeline_steps.train.lightning_module import DiffusionModule

log = logging.getLogger(__name__)

WARM_STEPS = 3
TIMED_STEPS = 5
SHORTEST_S = 60.0
"""A run that takes less than this uncompiled is not worth the question: compiling a U-Net takes about as long."""


@contextmanager
def force_eager(compiled: bool | None) -> Iterator[None]:
    """Within the block compiled parts run as they are written: drawing has other shapes, each of which would compile anew."""
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def is_compile_worthwhile(eager_s: float, compiled_s: float, compile_s: float, steps: int) -> bool:
    """Whether `steps` compiled steps and the compilation together take less time than as many plain ones."""
    return compile_s + steps * compiled_s < steps * eager_s


class CompileProbe(Callback):  # type: ignore[misc, unused-ignore]
    """Decides when training starts, once a run: a resumed one keeps what its checkpoint says.

    Args:
        mode: auto, on, off.
        batch: microbatch of a step in which the compiled parts work.
        steps: how many microbatches of that kind the run has (all of it: the decision must not depend on where it resumes).
        backend: torch.compile's.

    Attributes:
        report: the decision and what it rests on.
    """

    def __init__(
        self, mode: Literal["auto", "on", "off"], batch: Callable[[], TrainingBatch], steps: int, backend: Any = "inductor"
    ) -> None:
        self.mode = mode
        self.batch = batch
        self.steps = steps
        self.backend = backend
        self.report: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:
        """See the class."""
        if pl_module.compiled is None:
            pl_module.compiled = self._decide(trainer, pl_module)
        elif pl_module.compiled:
            self._compile(pl_module)
        self.report["compile"] = pl_module.compiled
        if pl_module.compiled or len(self.report) > 1:
            pl_module.speed |= self.report
        if trainer.is_global_zero and (pl_module.compiled or len(self.report) > 1):
            numbers = ", ".join(f"{name} {value}" for name, value in self.report.items() if name != "compile")
            log.info("torch.compile is %s%s", "on" if pl_module.compiled else "off", f": {numbers}" if numbers else "")

    def _decide(self, trainer: pl.Trainer, module: DiffusionModule) -> bool:
        if self.mode == "on":
            self._compile(module)
            return True
        on_gpu = trainer.strategy.root_device.type == "cuda"
        whole = not isinstance(trainer.strategy, pl.strategies.ModelParallelStrategy)
        if self.mode == "off" or not on_gpu or not whole or self.steps < 1:
            return False
        return self.probe(trainer, module)

    def probe(self, trainer: pl.Trainer, module: DiffusionModule) -> bool:
        """Time the step both ways. Weights, history and random state are afterwards what they were before."""
        from torch._dynamo.exc import BackendCompilerFailed
        from torch._inductor.exc import InductorError

        device = trainer.strategy.root_device
        batch = self.batch().to(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            module.prepare(batch.step)

            def seconds(count: int) -> float:
                _wait(device)
                begin = time.perf_counter()
                for _ in range(count):
                    torch.manual_seed(0)
                    with trainer.precision_plugin.train_step_context():
                        loss = module.losses(batch).mean()
                    loss.backward()  # type: ignore[no-untyped-call]
                    module.zero_grad(set_to_none=True)
                _wait(device)
                return time.perf_counter() - begin

            seconds(WARM_STEPS)
            eager_s = seconds(TIMED_STEPS) / TIMED_STEPS
            eager_s = float(trainer.strategy.broadcast(eager_s))  # process 0 decides for all
            self.report |= {"steps": self.steps, "eager_ms": round(eager_s * 1000, 2)}
            chosen = eager_s * self.steps >= SHORTEST_S
            if chosen:
                self._compile(module)
                try:
                    compile_s = max(0.0, seconds(WARM_STEPS) - WARM_STEPS * eager_s)
                    compiled_s = seconds(TIMED_STEPS) / TIMED_STEPS
                except (BackendCompilerFailed, InductorError) as error:  # no C++ compiler, a card that Triton does not know
                    log.warning("torch.compile failed, going on without: %s", str(error).splitlines()[0])
                    module.zero_grad(set_to_none=True)
                    compile_s, compiled_s = 0.0, float("inf")
                if compiled_s < float("inf"):
                    self.report |= {"compiled_ms": round(compiled_s * 1000, 2), "compile_s": round(compile_s, 1)}
                chosen = bool(trainer.strategy.broadcast(is_compile_worthwhile(eager_s, compiled_s, compile_s, self.steps)))
                if not chosen:
                    self._undo(module)
        return chosen

    def _compile(self, module: DiffusionModule) -> None:
        module.unet.compile(backend=self.backend)

    def _undo(self, module: DiffusionModule) -> None:
        module.unet._compiled_call_impl = None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
