"""Search for the number of microbatches of an optimizer step that fits into GPU memory, by trying.

Lightning's batch-size finder changes the batch size and trains real steps. Here the samples of a step are fixed: they are only
divided, and no weight changes.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda

from pipeline_steps.core.errors import ResourceError
from pipeline_steps.core.gpu_memory import is_out_of_memory
from pipeline_steps.train.data import AudioImageDataModule
from pipeline_steps.train.distributed import DistributedSetup
from pipeline_steps.train.lightning_module import DiffusionModule

log = logging.getLogger(__name__)

MEMORY_KEYS = "train.performance.accumulate_grad_batches, train.performance.gradient_checkpointing, train.resolution"
MORE_MEMORY = (
    "set accumulate_grad_batches to auto and gradient_checkpointing to true, lower the resolution, or choose a smaller "
    "backbone or a larger GPU"
)


def find_microbatches(
    module: DiffusionModule, datamodule: AudioImageDataModule, setup: DistributedSetup, batch_size: int
) -> int:
    """Smallest number of microbatches per process, doubled from 1, that fits; at most one per sample.

    Args:
        module: with the memory settings of the run; moved to the device.
        datamodule: its largest microbatch is tried.
        setup: hardware.
        batch_size: samples of an optimizer step.

    Raises:
        ResourceError: not even one sample fits.
    """
    most, count, own = batch_size // setup.processes, 1, datamodule.partition
    try:
        while True:
            datamodule.partition = replace(own, rank=own.ranks - 1, accumulate=count)  # the last microbatch is a largest one
            if _fits(module, datamodule, setup):
                break
            if count == most:
                raise ResourceError(f"{MEMORY_KEYS}: not even one sample fits into GPU memory", MORE_MEMORY)
            count = min(2 * count, most)
            log.warning("GPU memory is too small; trying %d microbatches per optimizer step", count)
    finally:
        datamodule.partition = own
    return count


def _fits(module: DiffusionModule, datamodule: AudioImageDataModule, setup: DistributedSetup) -> bool:
    """Whether the largest microbatch fits."""
    fits = True
    try:
        _run_twice(module, datamodule, setup)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    module.zero_grad(set_to_none=True)
    garbage_collection_cuda()  # here the error is released, whose frames hold the tensors
    return fits


def _run_twice(module: DiffusionModule, datamodule: AudioImageDataModule, setup: DistributedSetup) -> None:
    """Two microbatches, of which the second finds the gradients of the first and the optimizer's state in memory."""
    module.to(setup.device).train().on_fit_start()
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    copies = 2 + (setup.processes > 1)  # AdamW's moments; the buckets of DDP
    state = [torch.zeros_like(weight) for weight in weights for _ in range(copies)]
    batch = datamodule.largest_microbatch().to(setup.device)
    for _ in range(2):
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.precision == "bf16-mixed"):
            loss = module.per_sample_loss(batch).mean()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    del state
