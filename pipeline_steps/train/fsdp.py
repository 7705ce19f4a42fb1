"""A model that several processes hold together (FSDP2): cut block by block, gathered for drawing, checkpoints and export."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from pipeline_steps.train.lightning_module import DiffusionModule

PREFIX = "denoiser."


def shard_model(module: DiffusionModule) -> None:
    """Train a copy of the denoiser whose weights are cut among processes; the original stays whole, to draw and to export."""
    mesh = module.device_mesh["data_parallel"]
    whole = module.denoiser
    pieces = copy.deepcopy(whole)
    for block in blocks(pieces.unet):
        fully_shard(block, mesh=mesh)
    fully_shard(pieces, mesh=mesh)
    module.denoiser = pieces
    module.whole = [whole]  # in a list: no submodule
    module.strict_loading = False  # in the first phase the optimiser knows nothing of the U-Net; weights are checked afterwards


def blocks(unet: Any) -> list[nn.Module]:
    """Parts of a diffusers U-Net that are gathered one after the other."""
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]


def reshard(module: nn.Module) -> None:
    """Back to pieces: after a forward pass with no backward pass the outermost weights stay gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_state_dict(module: DiffusionModule) -> dict[str, Any]:
    """All weights on the CPU of process 0, nothing elsewhere. All processes must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    return state


def load_full_state_dict(module: DiffusionModule, state: dict[str, Any]) -> None:
    """Each process takes its pieces of whole weights."""
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))


def drop_untrained_optimizer_state(module: nn.Module, optimiser: torch.optim.Optimizer, saved: dict[int, Any]) -> None:
    """Torch's loader gives parameters without a saved state one of a step with no gradient; they had not learned at all.

    Args:
        module: what the optimiser trains.
        optimiser: just loaded.
        saved: states of the checkpoint by the number of the parameter in the module.
    """
    for number, parameter in enumerate(module.parameters()):
        if number not in saved:
            optimiser.state.pop(parameter, None)


def sync_full_copy(module: DiffusionModule) -> None:
    """Bring the whole copy in process 0 up to date. All processes must call it."""
    state = full_state_dict(module)
    if state:
        whole = module.whole[0]
        whole.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items()})
        whole.eval()


def unshard_model(module: DiffusionModule) -> None:
    """After training: the module has whole weights again (in process 0 those that were learned)."""
    sync_full_copy(module)
    module.denoiser = module.whole.pop()


class ShardedEMA:
    """Moving average of the pieces that this process holds, with the interface of torch's AveragedModel that Lightning uses.

    Averaging is done number by number, so the average of the pieces is the piece of the average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = LocalShards(module)

    def take(self, module: nn.Module) -> None:
        """Start from these weights."""
        for mine, now in zip(self.module.parameters(), module.parameters(), strict=True):
            mine.copy_(now.detach())
        for kept, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def update_parameters(self, module: nn.Module) -> None:
        """decay * average + (1 - decay) * now; the first time, now."""
        for mine, now in zip(self.module.parameters(), module.parameters(), strict=True):
            new = now.detach()
            mine.copy_(self.decay * mine + (1 - self.decay) * new if self.updates else new)
        for kept, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            kept.copy_(buffer)
        self.updates += 1


class LocalShards:
    """Copies of a module's parameters and buffers, in its order."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [value.detach().clone() for value in module.parameters()]
        self._buffers = [value.detach().clone() for value in module.buffers()]

    def parameters(self) -> Iterator[torch.Tensor]:
        """The copies."""
        return iter(self._parameters)

    def buffers(self) -> Iterator[torch.Tensor]:
        """The copies."""
        return iter(self._buffers)
