"""Text-audio space `laion`: an original checkpoint of laion-clap, run by the code of that package.

The package forces numpy < 2 and imports torchvision, which it does not declare, so it lives in an environment of its own
(extra `laion`). Windows, repetition of short sounds and batches are the same as for `clap`; nothing is downloaded, nothing
unpickled freely. For everyday use convert the checkpoint (`laion_convert`) and take `clap`: same vectors, one environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, Self

import torch

from pipeline_steps.audio.log_mel import clap_log_mel
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.models.text_audio.clap import ClapEncoder
from pipeline_steps.models.text_audio.convert_laion_clap import (
    DROPPED,
    LOWEST_HZ,
    ClapArchitecture,
    Weights,
    infer_architecture,
    load_text_config,
    read_laion,
)

KEY = "embed.laion"
ACTION = (
    "in an environment of its own: pip install 'seeing-sound[laion]'; or convert the checkpoint and take embed.encoder clap"
)


def clap_module(name: str) -> Any:
    """A module of laion-clap's networks. The package itself is not imported: it would want its training tools as well.

    Raises:
        ConfigError: the package, or something it imports, is not installed.
    """
    spec = importlib.util.find_spec("laion_clap")
    if spec is None or spec.origin is None:
        raise ConfigError("embed.encoder laion: the package laion-clap is not installed", ACTION)
    folder = str(Path(spec.origin).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # laion-clap imports its own parts as top-level `clap_module`
    try:
        return importlib.import_module(f"clap_module.{name}")
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"embed.encoder laion: laion-clap cannot be imported: {error}", ACTION) from error


class LaionClapEncoder(ClapEncoder):
    """`TextAudioEncoder` over laion-clap's networks (HTSAT and RoBERTa).

    Args:
        checkpoint: laion-clap's .pt file.
        sha256: of that file, checked when given.
        text: folder with RoBERTa's `config.json` and vocabulary.
        device: auto, cpu or cuda.
        root: folder that relative paths start from.
    """

    name = "laion"
    version = 1

    def __init__(self, checkpoint: str, sha256: str = "", text: str = "", device: str = "auto", root: Path = Path()) -> None:
        super().__init__(checkpoint, sha256, device, "float32", "torch", root)
        self.text = text
        self._shape: ClapArchitecture | None = None

    def fetch(self) -> Path:
        """The checkpoint's place; its weights are read to learn their shape. Calling it again does nothing."""
        path = self.root / self.model
        if self._shape is None:
            weights = self._weights(path)
            self._shape = infer_architecture(weights)
            self.front_end = self._shape.front_end
            self._config = {"projection_dim": self._shape.dimension}
            self._identity = {"sha256": sha256_file(path)}
        return path

    def _weights(self, path: Path) -> Weights:
        load_text_config(self.root / self.text)
        return read_laion(path, self.revision)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the constructor needs to make this space again; files outside the project are not written down."""
        if Path(self.model).is_absolute() or Path(self.text).is_absolute():
            return {}
        return {"checkpoint": self.model, "sha256": self.revision, "text": self.text}

    def load(self) -> Self:
        """Build laion-clap's network and give it the weights; calling it again does nothing.

        Raises:
            ConfigError: laion-clap is not installed.
            IntegrityError: the weights do not fit.
        """
        if self._network is None:
            from transformers import AutoTokenizer

            model = clap_module("model")
            weights = self._weights(self.fetch())
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.root / self.text, trust_remote_code=False, local_files_only=True, model_type="roberta"
            )
            self._network = self._build(model, weights).to(self.device).eval()
            self._sounds = self._forward_windows
        return self

    def _build(self, model: Any, weights: Weights) -> Any:
        """laion-clap's CLAP with its own HTSAT, and RoBERTa made from its settings (the package would ask a hub)."""
        from transformers import RobertaConfig, RobertaModel

        shape = infer_architecture(weights)
        audio = model.CLAPAudioCfp("HTSAT", "tiny", 48_000, 1024, 1024, 480, int(LOWEST_HZ), 14_000, 527, 64, 480_000)
        fusion = "aff_2d" if shape.fused else "None"
        branch = clap_module("htsat").HTSAT_Swin_Transformer(
            embed_dim=shape.width, depths=list(shape.depths), num_heads=list(shape.heads), window_size=shape.window,
            config=audio, enable_fusion=shape.fused, fusion_type=fusion,
        )  # fmt: skip
        settings = RobertaConfig.from_dict(load_text_config(self.root / self.text))
        empty = model.CLAPTextCfg(77, 1, settings.hidden_size, 1, 1, "transformer")
        features = branch.num_features
        network = model.CLAP(features, audio, empty, False, shape.fused, fusion, shape.dimension)
        network.audio_branch, network.text_branch, network.text_branch_type = branch, RobertaModel(settings), "roberta"
        del network.token_embedding, network.positional_embedding, network.ln_final
        missing, unexpected = network.load_state_dict(weights, strict=False)
        odd = [name for name in (*missing, *unexpected) if not DROPPED.match(name)]  # those shape no vector
        if odd:
            raise IntegrityError(f"{self.model}: {len(odd)} weights do not fit laion-clap's network (first: {odd[0]})")
        return network

    @torch.inference_mode()
    def _embed_windows(self, windows: torch.Tensor) -> torch.Tensor:
        windows = windows.to(self.device)
        sample = {"waveform": windows, "longer": torch.zeros(len(windows), 1, dtype=torch.bool, device=windows.device)}
        if self.front_end.scale == "htk":
            sample["mel_fusion"] = clap_log_mel(windows, self.front_end)[:, None].repeat(1, 4, 1, 1)
        heard = self._network.audio_branch(sample, device=windows.device)["embedding"]
        return torch.nn.functional.normalize(self._network.audio_projection(heard), dim=-1)

    @torch.inference_mode()
    def _embed_texts(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(self.device)
        data = {"input_ids": ids, "attention_mask": (ids != self._tokenizer.pad_token_id).long()}
        embedded: torch.Tensor = self._network.get_text_embedding(data)
        return embedded
