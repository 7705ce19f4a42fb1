"""Parameters of the `retrieve` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline_steps.core.config import StageConfig


class RetrieveConfig(StageConfig):
    """How sounds are searched, calibrated and hubs damped, and how good the interactive index has to be."""

    search: Literal["auto", "exact", "cluster", "gpu", "annoy"] = Field(
        "auto", description="who finds the neighbours; auto: exact for small pools, else a GPU if there is one, else cluster"
    )
    recall_target: float = Field(0.97, gt=0, lt=1, description="cluster probes cells until recall@10 on a sample reaches it")
    k: int = Field(50, ge=1, le=1000, description="neighbours kept per text")
    block: int = Field(1024, ge=1, le=65536, description="queries per matrix product")
    damping: Literal["none", "csls", "dis"] = Field("csls", description="hub damping: CSLS or dynamic inverted softmax")
    damping_k: int = Field(20, ge=1, le=1000, description="neighbourhood of CSLS; rank that activates the inverted softmax")
    damping_beta: float = Field(5.0, gt=0, le=1000, description="inverse temperature of the inverted softmax")
    null_sample: int = Field(2000, ge=2, le=1_000_000, description="random pool sounds that calibrate each text's scores")
    annoy_trees: int = Field(100, ge=0, le=2000, description="trees of the interactive index; 0: none, `sonify find` scans")
    annoy_search_k: int = Field(20_000, ge=1, le=100_000_000, description="nodes Annoy inspects per query")
    recall_floor: float = Field(0.95, ge=0, le=1, description="the stage fails when Annoy's recall@10 against exact is below")
    recall_sample: int = Field(500, ge=1, le=100_000, description="texts on which recall is measured")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of Annoy and of the samples")
