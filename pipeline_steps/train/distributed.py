"""How a run meets its hardware: processes and machines, Lightning's strategy, memory layout of the model.

Three ways start the processes, all Lightning's own: it starts the children of one machine itself (`speed.devices`), each
machine is started by hand or by a scheduler with NODE_RANK, MASTER_ADDR and MASTER_PORT set, or torchrun or srun starts every
process.
All processes prepare the same data from the memo and the run's folder, which they must share.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from pipeline_steps.core.errors import ConfigError, IntegrityError, ResourceError
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.data import BatchPartition

PARENT_WATCH_S = 1.0


@dataclass(frozen=True, slots=True)
class DistributedSetup:
    """Where a run takes place.

    Attributes:
        accelerator, precision: in Lightning's words.
        devices: processes on this machine.
        num_nodes: machines.
        strategy: how they share the model.
        rank: of this process among all.
        accumulate: microbatches of an optimiser step in each process.
    """

    accelerator: str
    precision: str
    devices: int
    num_nodes: int
    strategy: Literal["single", "ddp", "fsdp"]
    rank: int
    accumulate: int

    @property
    def processes(self) -> int:
        """On all machines."""
        return self.devices * self.num_nodes

    @property
    def first(self) -> bool:
        """Whether this process speaks, tracks and writes for all."""
        return self.rank == 0

    @property
    def share(self) -> BatchPartition:
        """What this process takes of each optimiser step."""
        return BatchPartition(self.rank, self.processes, self.accumulate)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return torch.device("cuda", self.rank % self.devices) if self.accelerator == "gpu" else torch.device("cpu")

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of Lightning's Trainer."""
        return {
            "accelerator": self.accelerator,
            "precision": self.precision,
            "devices": self.devices,
            "num_nodes": self.num_nodes,
            "strategy": self._strategy(),
            "accumulate_grad_batches": self.accumulate,
        }

    def _strategy(self) -> Strategy | str:
        if self.strategy == "ddp":
            # The composer rests while the U-Net learns and the other way round.
            return DDPStrategy(find_unused_parameters=True)
        if self.strategy == "fsdp":
            return ModelParallelStrategy(
                data_parallel_size=self.processes, tensor_parallel_size=1, save_distributed_checkpoint=False
            )
        return "auto"


def resolve_distributed_setup(config: TrainConfig, accelerator: str, precision: str) -> DistributedSetup:
    """Hardware of this process, from the section and the environment of the launcher.

    Raises:
        ConfigError: a batch is too small for so many slices, or the launcher started another number of processes.
        ResourceError: more GPUs are asked for than torch sees.
    """
    speed = config.speed
    present = torch.cuda.device_count() if accelerator == "gpu" else 0
    devices = (present or 1) if speed.devices == "auto" else speed.devices
    if accelerator == "gpu" and devices > present:
        raise ResourceError(
            f"train.speed.devices is {devices}, but torch sees {present} GPU{'s' * (present != 1)}",
            "lower it, or set it to auto",
        )
    processes = devices * speed.num_nodes
    strategy: Literal["single", "ddp", "fsdp"] = "single"
    if processes > 1 or speed.strategy == "fsdp":
        strategy = "fsdp" if speed.strategy == "fsdp" else "ddp"
    rank = _rank(devices, processes) if processes > 1 else 0
    hardware = DistributedSetup(accelerator, precision, devices, speed.num_nodes, strategy, rank, speed.accumulate)
    if strategy == "fsdp" and config.recipe != "scratch":
        raise ConfigError(
            f"train.speed.strategy fsdp is of recipe scratch; what recipe {config.recipe} trains is small",
            "set train.speed.strategy to ddp or auto",
        )
    if accelerator == "gpu":
        torch.cuda.set_device(hardware.device)  # also for frozen models, which Lightning does not move
    for name in ("compose", "refine") if config.recipe == "scratch" else ("adapt",):
        phase = getattr(config.optimiser, name)
        if phase.steps and phase.batch_size < hardware.share.parts:
            raise ConfigError(
                f"train.optimiser.{name}.batch_size is {phase.batch_size}, fewer than its {hardware.share.parts} slices "
                f"({processes} processes x train.speed.accumulate {speed.accumulate})",
                "raise batch_size (it is that of an optimiser step), or lower train.speed.accumulate or devices",
            )
    if processes > 1 and rank % devices and "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_PROCID" not in os.environ:
        _exit_when_parent_dies()
    return hardware


def _rank(devices: int, processes: int) -> int:
    """Rank of this process among all: torchrun and SLURM say it, else it follows from the machine's and the local rank."""
    environment = os.environ
    started = environment.get("SLURM_NTASKS") if "SLURM_PROCID" in environment else None
    if "TORCHELASTIC_RUN_ID" in environment:
        started = environment["WORLD_SIZE"]
    if started is not None and int(started) != processes:
        raise ConfigError(
            f"{started} processes were started, but train.speed says {processes} (devices x num_nodes)",
            "start devices x num_nodes processes, devices on each machine",
        )
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["RANK"])
    if started is not None:
        return int(environment["SLURM_PROCID"])
    node = int(environment.get("NODE_RANK", environment.get("GROUP_RANK", "0")))
    return node * devices + int(environment.get("LOCAL_RANK", "0"))


def _exit_when_parent_dies() -> None:
    """A process that another one started ends with it, also when that one is killed: nobody would wait for it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="leave with parent").start()


def apply_memory_settings(unet: Any, config: TrainConfig, hardware: DistributedSetup) -> None:
    """Memory layout and checkpointing of diffusers' U-Net, before training."""
    if config.speed.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    wanted = config.speed.channels_last
    if wanted == "on" or (wanted == "auto" and hardware.accelerator == "gpu"):
        unet.to(memory_format=torch.channels_last)


def verify_ranks_agree(trainer: Any, hardware: DistributedSetup, identity: str) -> None:
    """Stop unless all processes are about to do the same thing.

    Raises:
        IntegrityError: another process has other data, parameters or program, or starts at another step.
    """
    if hardware.processes == 1:
        return
    if trainer.world_size != hardware.processes or trainer.global_rank != hardware.rank:
        raise IntegrityError(
            f"this is process {trainer.global_rank} of {trainer.world_size}, but was prepared as {hardware.rank} of "
            f"{hardware.processes}",
            "set NODE_RANK, or RANK and WORLD_SIZE, as the launcher numbers its processes",
        )
    first = trainer.strategy.broadcast(identity)
    if first != identity:
        raise IntegrityError(
            f"process {hardware.rank} would train {identity}, process 0 trains {first}",
            "all machines need the same project folder (data, memo, .runs), program, torch and train.threads",
        )


def kill_child_processes(trainer: Any) -> None:
    """Kill the processes that this one started; they would wait for it for ever."""
    launcher = trainer.strategy.launcher
    for process in getattr(launcher, "procs", []):
        if process.poll() is None:
            process.kill()
