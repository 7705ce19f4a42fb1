"""Hardware of a run: accelerator and precision, processes and machines, memory settings of the model.

Processes are started by Lightning itself (`performance.devices`), once per machine by hand or by a scheduler that sets
NODE_RANK, MASTER_ADDR and MASTER_PORT, or one by one by torchrun or srun. All processes prepare the same data, from the result
cache and the run folder, which they must share.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from pipeline_steps.core.errors import ConfigError, IntegrityError, ResourceError
from pipeline_steps.train.config_groups import PerformanceConfig
from pipeline_steps.train.data import BatchPartition

log = logging.getLogger(__name__)

PARENT_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class DistributedSetup:
    """Hardware of this process, with every `auto` resolved.

    Attributes:
        accelerator, precision: arguments of Lightning's Trainer.
        devices: processes on this machine.
        rank: of this process among all.
        performance: group of the section.
    """

    accelerator: str
    precision: str
    devices: int = 1
    rank: int = 0
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)

    @property
    def on_gpu(self) -> bool:
        """Whether training runs on a GPU."""
        return self.accelerator == "gpu"

    @property
    def processes(self) -> int:
        """Processes on all machines."""
        return self.devices * self.performance.num_nodes

    @property
    def is_first(self) -> bool:
        """Whether this process logs, tracks and exports."""
        return self.rank == 0

    @property
    def partition(self) -> BatchPartition:
        """Slice of each optimizer step that this process takes; one microbatch for `auto`, until the number is found."""
        accumulate = self.performance.accumulate_grad_batches
        return BatchPartition(self.rank, self.processes, 1 if accumulate == "auto" else accumulate)

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return torch.device("cuda", self.rank % self.devices) if self.on_gpu else torch.device("cpu")

    @property
    def compile(self) -> bool:
        """Whether the U-Net is compiled."""
        return self._resolve(self.performance.compile)

    @property
    def channels_last(self) -> bool:
        """Whether the U-Net's memory format is channels-last."""
        return self._resolve(self.performance.channels_last)

    @property
    def loader_arguments(self) -> dict[str, Any]:
        """Arguments of the DataLoader."""
        workers = self.performance.num_workers
        count = (2 if self.on_gpu else 0) if workers == "auto" else workers
        return {
            "num_workers": count,
            "prefetch_factor": self.performance.prefetch_factor if count else None,
            "pin_memory": self._resolve(self.performance.pin_memory),
        }

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of Lightning's Trainer."""
        # In a step that is skipped, no parameter gets a gradient.
        strategy = DDPStrategy(find_unused_parameters=True) if self.processes > 1 else "auto"
        return {
            "accelerator": self.accelerator,
            "precision": self.precision,
            "devices": self.devices,
            "num_nodes": self.performance.num_nodes,
            "strategy": strategy,
        }

    def _resolve(self, switch: bool | str) -> bool:
        return self.on_gpu if switch == "auto" else bool(switch)


def resolve_setup(device: str, precision: str, performance: PerformanceConfig) -> DistributedSetup:
    """Hardware of this process, from keys of section `train` and the environment of the launcher.

    Raises:
        ConfigError: the launcher started another number of processes.
        ResourceError: a GPU, or more GPUs than torch sees, are requested.
    """
    present = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not present:
        raise ResourceError(
            f"train.device: cuda is requested, but torch {torch.__version__} sees no GPU",
            "set train.device to auto or cpu, or repair the driver",
        )
    if device == "auto" and not present:
        log.info("no GPU: training on the CPU with %d threads", torch.get_num_threads())
    devices = (present or 1) if performance.devices == "auto" else performance.devices
    if present and devices > present:
        raise ResourceError(
            f"train.performance.devices is {devices}, but torch sees {present} GPU{'s' * (present != 1)}",
            "lower it, or set it to auto",
        )
    if precision == "auto":
        precision = "bf16-mixed" if present else "32-true"
    processes = devices * performance.num_nodes
    rank = _rank(devices, processes) if processes > 1 else 0
    setup = DistributedSetup("gpu" if present else "cpu", precision, devices, rank, performance)
    if setup.on_gpu:
        torch.cuda.set_device(setup.device)  # also for frozen models, which Lightning does not move
    if processes > 1 and rank % devices and "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_PROCID" not in os.environ:
        _exit_when_parent_dies()
    return setup


def check_batch_size(batch_size: int, partition: BatchPartition, key: str) -> None:
    """Check that every microbatch gets a sample.

    Raises:
        ConfigError: the batch size is smaller than the number of microbatches.
    """
    if batch_size < partition.parts:
        raise ConfigError(
            f"{key}: batch_size {batch_size} is smaller than the number of microbatches, {partition.parts} "
            f"({partition.ranks} processes x train.performance.accumulate_grad_batches {partition.accumulate})",
            "raise batch_size, or lower accumulate_grad_batches or devices",
        )


def _rank(devices: int, processes: int) -> int:
    """Rank of this process: set by torchrun or SLURM, else computed from the ranks of the machine and on the machine."""
    environment = os.environ
    started = environment.get("SLURM_NTASKS") if "SLURM_PROCID" in environment else None
    if "TORCHELASTIC_RUN_ID" in environment:
        started = environment["WORLD_SIZE"]
    if started is not None and int(started) != processes:
        raise ConfigError(
            f"train.performance: {processes} processes are configured (devices x num_nodes), but {started} were started",
            "start `devices` processes on each of `num_nodes` machines",
        )
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["RANK"])
    if started is not None:
        return int(environment["SLURM_PROCID"])
    node = int(environment.get("NODE_RANK", environment.get("GROUP_RANK", "0")))
    return node * devices + int(environment.get("LOCAL_RANK", "0"))


def _exit_when_parent_dies() -> None:
    """Exit this process when the process that started it ends, even if that one is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="exit with parent").start()


def apply_memory_settings(unet: Any, setup: DistributedSetup) -> None:
    """Apply gradient checkpointing and memory format to diffusers' U-Net."""
    if setup.performance.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if setup.channels_last:
        unet.to(memory_format=torch.channels_last)


def verify_ranks_agree(trainer: Any, setup: DistributedSetup, identity: str) -> None:
    """Check that all processes are about to run the same job.

    Raises:
        IntegrityError: another process has other data, parameters or code, or starts at another step.
    """
    if setup.processes == 1:
        return
    if trainer.world_size != setup.processes or trainer.global_rank != setup.rank:
        raise IntegrityError(
            f"this is process {trainer.global_rank} of {trainer.world_size}, but it was prepared as {setup.rank} of "
            f"{setup.processes}",
            "set NODE_RANK, or RANK and WORLD_SIZE, as the launcher numbers its processes",
        )
    first = trainer.strategy.broadcast(identity)
    if first != identity:
        raise IntegrityError(
            f"process {setup.rank} would train {identity}, process 0 trains {first}",
            "give all machines the same project folder (data, cache, .runs), code, torch and train.num_threads",
        )


def kill_child_processes(trainer: Any) -> None:
    """Kill the processes that this one started; otherwise they would wait for it forever."""
    launcher = trainer.strategy.launcher
    for process in getattr(launcher, "procs", []):
        if process.poll() is None:
            process.kill()
