"""Audio adapter of a tiny backbone in the layout that stage `train` exports; its images depend on the audio and on a text."""

from __future__ import annotations

from pathlib import Path


def export_adapter(folder: Path, assets: Path) -> Path:
    """Write an adapter with YAMNet as encoder, whose weights are far from where training begins; returns its folder."""
    import torch

    from pipeline_steps.diffusion.audio_prompt import AudioPrompt
    from pipeline_steps.diffusion.audio_tokens import YamnetTokenizer
    from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
    from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
    from pipeline_steps.diffusion.pipelines.base import GenerationConfig
    from pipeline_steps.diffusion.pipelines.ip_adapter import AudioIPAdapterPipeline, save_adapter
    from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
    from pipeline_steps.models.audio.yamnet import YamNet
    from tests.factories.checkpoints.stable_diffusion import stable_diffusion

    backbone = StableDiffusionBackbone(str(stable_diffusion(folder / "backbone"))).load()
    torch.manual_seed(0)
    resampler = PerceiverResampler(1024, 1, num_queries=3, output_width=24, dim=32, depth=1, heads=2)
    adapter = AudioIPAdapter(backbone, resampler, AudioPrompt(""))
    with torch.no_grad():
        for weight in adapter.parameters():
            weight += 0.3 * torch.randn(weight.shape)
    config = GenerationConfig(num_inference_steps=2, guidance_scale=2.5, max_seconds=2.0, resolution=64)
    pipeline = AudioIPAdapterPipeline(adapter, backbone.build_scheduler("dpm++"), None, config)
    tagger = YamNet(assets)
    save_adapter(folder / "models/audio2image", pipeline, YamnetTokenizer(tagger, tagger), assets)
    return folder / "models/audio2image"
