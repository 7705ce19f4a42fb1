"""Text-audio encoder `laion_clap`: an original checkpoint of laion-clap, run by the code of that package.

The package requires numpy < 2 and imports torchvision, which it does not declare, so it needs an environment of its own (extra
`laion`). Windows, repetition of short clips and batches are those of `clap`. Nothing is downloaded, and no pickle may run code.
For everyday use convert the checkpoint (`convert_laion_clap`) and select `clap`: the vectors agree, and one environment serves.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS
from pipeline_steps.models.text_audio.clap import ClapEncoder, ClapEncoderConfig, Device

if TYPE_CHECKING:
    import torch

    from pipeline_steps.models.text_audio.convert_laion_clap import ClapArchitecture, Weights

ACTION = (
    "in an environment of its own: pip install 'seeing-sound[laion]'; or convert the checkpoint and set embed.encoder to clap"
)


def clap_module(name: str) -> Any:
    """A module of laion-clap's networks. The package itself is not imported, because it imports its training tools.

    Raises:
        ConfigError: the package, or something it imports, is not installed.
    """
    spec = importlib.util.find_spec("laion_clap")
    if spec is None or spec.origin is None:
        raise ConfigError("embed.encoder laion_clap: the package laion-clap is not installed", ACTION)
    folder = str(Path(spec.origin).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # laion-clap imports its own parts as top-level `clap_module`
    try:
        return importlib.import_module(f"clap_module.{name}")
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"embed.encoder laion_clap: laion-clap cannot be imported: {error}", ACTION) from error


class LaionClapEncoderConfig(StageConfig):
    """Group `embed.laion_clap`."""

    checkpoint: str = Field(default="", max_length=500, description="laion-clap's .pt file")
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$", description="sha256 of the .pt file, checked when given")
    text_model_dir: str = Field(default="", max_length=500, description="folder with RoBERTa's configuration and vocabulary")
    device: Device = Field(default="auto", description="auto: a GPU if there is one")


@TEXT_AUDIO_ENCODERS.register("laion_clap")
class LaionClapEncoder(ClapEncoder):
    """Text-audio encoder over laion-clap's networks (HTSAT and RoBERTa)."""

    name = "laion"
    version = 2
    config_class = LaionClapEncoderConfig
    recorded_as: ClassVar = {"text_model_dir": "text"}

    def __init__(self, config: LaionClapEncoderConfig, layout: ProjectPaths) -> None:
        settings = {"model": config.checkpoint, "revision": config.sha256, "device": config.device, "dtype": "float32"}
        super().__init__(ClapEncoderConfig.model_validate(settings), layout)
        self.text_model_dir = self.root / config.text_model_dir
        self._recorded = {"checkpoint": config.checkpoint, "sha256": config.sha256, "text": config.text_model_dir}
        self._architecture: ClapArchitecture | None = None

    @classmethod
    def check_config(cls, config: Any) -> None:
        if not (config.checkpoint and config.text_model_dir):
            raise ValueError(
                "encoder laion_clap needs laion_clap.checkpoint, a .pt file, and laion_clap.text_model_dir, a folder"
            )

    @classmethod
    def float32_config(cls, config: Any) -> None:
        return None

    def fetch(self) -> Path:
        """Path of the checkpoint; its weights are read to infer the architecture. A second call does nothing."""
        from pipeline_steps.models.text_audio.convert_laion_clap import infer_architecture

        path = self.root / self.model
        if self._architecture is None:
            self._architecture = infer_architecture(self._weights(path))
            self.front_end = self._architecture.front_end
            self._model_config = {"projection_dim": self._architecture.dimension}
            self._identity = {"sha256": sha256_file(path)}
        return path

    def _weights(self, path: Path) -> Weights:
        from pipeline_steps.models.text_audio.convert_laion_clap import load_text_config, read_laion

        load_text_config(self.text_model_dir)
        return read_laion(path, self.revision)

    @property
    def parameters(self) -> dict[str, Any]:
        """Empty for files outside the project, whose paths are not recorded."""
        outside = any(Path(self._recorded[name]).is_absolute() for name in ("checkpoint", "text"))
        return {} if outside else self._recorded

    def load(self) -> Self:
        """Build laion-clap's network and load the weights; a second call does nothing.

        Raises:
            ConfigError: laion-clap is not installed.
            IntegrityError: the weights do not fit.
        """
        if self._network is None:
            from transformers import AutoTokenizer

            model = clap_module("model")
            weights = self._weights(self.fetch())
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.text_model_dir, trust_remote_code=False, local_files_only=True, model_type="roberta"
            )
            self._network = self._build(model, weights).to(self.device).eval()
            self._audio_forward = self._forward_windows
        return self

    def _build(self, model: Any, weights: Weights) -> Any:
        """laion-clap's CLAP with its own HTSAT, and RoBERTa built from its settings (the package would download it)."""
        from transformers import RobertaConfig, RobertaModel

        from pipeline_steps.models.text_audio.convert_laion_clap import DROPPED, LOWEST_HZ, infer_architecture, load_text_config

        shape = infer_architecture(weights)
        audio = model.CLAPAudioCfp("HTSAT", "tiny", 48_000, 1024, 1024, 480, int(LOWEST_HZ), 14_000, 527, 64, 480_000)
        fusion = "aff_2d" if shape.fused else "None"
        branch = clap_module("htsat").HTSAT_Swin_Transformer(
            embed_dim=shape.width, depths=list(shape.depths), num_heads=list(shape.heads), window_size=shape.window,
            config=audio, enable_fusion=shape.fused, fusion_type=fusion,
        )  # fmt: skip
        settings = RobertaConfig.from_dict(load_text_config(self.text_model_dir))
        empty = model.CLAPTextCfg(77, 1, settings.hidden_size, 1, 1, "transformer")
        features = branch.num_features
        network = model.CLAP(features, audio, empty, False, shape.fused, fusion, shape.dimension)
        network.audio_branch, network.text_branch, network.text_branch_type = branch, RobertaModel(settings), "roberta"
        del network.token_embedding, network.positional_embedding, network.ln_final
        missing, unexpected = network.load_state_dict(weights, strict=False)
        odd = [name for name in (*missing, *unexpected) if not DROPPED.match(name)]  # dropped weights shape no vector
        if odd:
            raise IntegrityError(f"{self.model}: {len(odd)} weights do not fit laion-clap's network (first: {odd[0]})")
        return network

    def _embed_windows(self, windows: torch.Tensor) -> torch.Tensor:
        import torch

        from pipeline_steps.audio.log_mel import clap_log_mel

        windows = windows.to(self.device)
        sample = {"waveform": windows, "longer": torch.zeros(len(windows), 1, dtype=torch.bool, device=windows.device)}
        if self.front_end.scale == "htk":
            sample["mel_fusion"] = clap_log_mel(windows, self.front_end)[:, None].repeat(1, 4, 1, 1)
        embedded = self._network.audio_branch(sample, device=windows.device)["embedding"]
        return torch.nn.functional.normalize(self._network.audio_projection(embedded), dim=-1)

    def _embed_texts(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(self.device)
        data = {"input_ids": ids, "attention_mask": (ids != self._tokenizer.pad_token_id).long()}
        embedded: torch.Tensor = self._network.get_text_embedding(data)
        return embedded
