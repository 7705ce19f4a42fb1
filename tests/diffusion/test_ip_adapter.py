"""Audio IP-Adapter: its export gives the same images in a stock pipeline, and the backbone is unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.diffusion.audio_prompt import AudioPrompt, blend
from pipeline_steps.diffusion.audio_tokens import AstTokenizer
from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
from pipeline_steps.diffusion.pipelines import ip_adapter
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.base import GenerationConfig, latents_generator
from pipeline_steps.diffusion.pipelines.ip_adapter import IP_ADAPTER, AudioIPAdapterPipeline, save_adapter
from pipeline_steps.diffusion.stable_diffusion import FILES, StableDiffusionBackbone
from pipeline_steps.models.audio.ast import AstEncoder
from pipeline_steps.models.audio.yamnet import YamNet
from tests.factories.checkpoints.ast import ast_checkpoint
from tests.factories.checkpoints.stable_diffusion import stable_diffusion

GENERATION = GenerationConfig(num_inference_steps=3, guidance_scale=2.5, max_seconds=2.0, resolution=64)
TONE = (0.3 * np.sin(np.arange(48_000) / 20)).astype(np.float32)
NOISE = (0.2 * np.random.default_rng(1).standard_normal(72_000)).astype(np.float32)
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones of both prediction types, one without a text encoder, and an audio encoder."""
    root = tmp_path_factory.mktemp("checkpoints")
    stable_diffusion(root / "epsilon")
    stable_diffusion(root / "v_prediction", "v_prediction")
    stable_diffusion(root / "textless", text="")
    stable_diffusion(root / "bert", "v_prediction", text="bert")
    ast_checkpoint(root / "ast")
    return root


@pytest.fixture(scope="module")
def export(checkpoints: Path, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Write an adapter with weights far from the initial ones."""

    def make(name: str = "epsilon", solver: str = "dpm++", prompt: str = "") -> Path:
        torch.manual_seed(0)
        backbone = StableDiffusionBackbone(str(checkpoints / name)).load()
        adapter = AudioIPAdapter(
            backbone, PerceiverResampler(24, 12, num_queries=3, output_width=24, dim=32, depth=1, heads=2), AudioPrompt(prompt)
        )
        with torch.no_grad():
            for weight in adapter.parameters():
                weight += 0.3 * torch.randn(weight.shape)
        target = tmp_path_factory.mktemp("model") / "models/audio2image"
        encoder = AstTokenizer(AstEncoder(str(checkpoints / "ast")), YamNet(assets))
        scheduler = backbone.build_scheduler(solver)  # type: ignore[arg-type]
        save_adapter(target, AudioIPAdapterPipeline(adapter, scheduler, None, GENERATION), encoder, assets)
        return target

    return make


@pytest.fixture(scope="module")
def exported(export: Export) -> Path:
    return export()


@pytest.fixture(scope="module")
def pipeline(exported: Path) -> AudioIPAdapterPipeline:
    loaded = AutoAudio2ImagePipeline.from_pretrained(exported, "cpu")
    assert isinstance(loaded, AudioIPAdapterPipeline)
    return loaded


@pytest.mark.parametrize(
    ("name", "solver", "prompt", "guidance"),
    [
        ("epsilon", "dpm++", "", 2.5),
        ("epsilon", "ddim", "a dog barks", 2.5),
        ("epsilon", "dpm++", "a drawing of {}", 2.5),
        ("v_prediction", "dpm++", "{}", 2.5),
        ("bert", "dpm++", "{}", 2.5),
        ("epsilon", "dpm++", "", 1.0),
        ("textless", "dpm++", "", 2.5),
    ],
)
def test_a_stock_pipeline_generates_the_same_image(
    checkpoints: Path, export: Export, name: str, solver: str, prompt: str, guidance: float
) -> None:
    folder = export(name, solver, prompt)
    ours = AudioIPAdapterPipeline.from_pretrained(folder, "cpu")
    embeds = ours.encode_audio(TONE)
    condition = ours.collate([embeds, embeds])
    generated = ours.sample_images(condition, [0, 1], seed=5, guidance_scale=guidance) / 2 + 0.5

    place = checkpoints / ("epsilon" if name == "textless" else name)  # a stock pipeline requires a text encoder
    stock = StableDiffusionPipeline.from_pretrained(place, safety_checker=None, local_files_only=True)
    kind = DDIMScheduler if solver == "ddim" else DPMSolverMultistepScheduler
    stock.scheduler = kind.from_config(stock.scheduler.config, **({"clip_sample": False} if solver == "ddim" else {}))
    stock.load_ip_adapter(str(folder), subfolder="", weight_name=IP_ADAPTER, image_encoder_folder=None)
    stock.set_progress_bar_config(disable=True)

    def generate(samples: np.ndarray, index: int) -> torch.Tensor:
        arguments = ours.stock_arguments(samples)
        if guidance == 1:
            del arguments["negative_prompt_embeds"]
            arguments["ip_adapter_image_embeds"] = [arguments["ip_adapter_image_embeds"][0][1:]]
        return stock(
            **arguments,
            generator=latents_generator(5, index),
            num_inference_steps=GENERATION.num_inference_steps,
            guidance_scale=guidance,
            height=64,
            width=64,
            output_type="pt",
        ).images[0]

    for number in (0, 1):
        assert (generate(TONE, number) - generated[number]).abs().max() <= 1e-3
    assert (generate(NOISE, 0) - generated[0]).abs().max() > 1e-2, "other audio gives another image"
    stock.set_ip_adapter_scale(0.0)
    assert (generate(TONE, 0) - generated[0]).abs().max() > 1e-2, "the adapter has an effect"


def test_images_are_a_function_of_audio_seed_and_guidance(pipeline: AudioIPAdapterPipeline) -> None:
    first = pipeline(TONE, num_samples=2, seed=3)
    assert first.shape == (2, 64, 64, 3)
    assert first.dtype == np.uint8
    alone = pipeline(TONE, num_samples=1, seed=3)
    assert np.abs(first[0].astype(int) - alone[0].astype(int)).max() <= 1, "equal up to rounding"
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, pipeline(TONE, num_samples=2, seed=4))
    assert not np.array_equal(first, pipeline(TONE, num_samples=2, seed=3, guidance_scale=9.0))
    assert not np.array_equal(first, pipeline(0.1 * TONE, num_samples=2, seed=3)), "the level has an effect"
    many = pipeline.generate_batch([pipeline.encode_audio(sound) for sound in (NOISE, TONE)], 2, seed=3)
    assert np.abs(many[1].astype(int) - first.astype(int)).max() <= 1
    assert pipeline.generate_batch([], 2).shape == (0, 2, 64, 64, 3)


def test_known_tracks_change_the_prompt_of_a_mixture_alone(pipeline: AudioIPAdapterPipeline) -> None:
    mixture = TONE + NOISE[: len(TONE)]
    plain, named = pipeline.encode_audio(mixture), pipeline.encode_mixture(mixture, [TONE, NOISE])
    assert torch.equal(named.embeds, plain.embeds), "the audio tokens are those of the mixture"
    assert named.text.shape == plain.text.shape
    one = pipeline.encode_mixture(mixture, [mixture])
    assert torch.equal(one.text, plain.text)
    assert torch.equal(one.embeds, plain.embeds)
    assert pipeline.encoder is not None
    tags = [pipeline.encoder.tag(track, 10.0) for track in (TONE, NOISE)]
    _, loudness = pipeline.encoder.tag(mixture, 10.0)
    texts = pipeline.adapter.audio_prompt.mixture_texts(tags, loudness)
    assert torch.equal(named.text, blend(texts, pipeline.adapter.encode_prompt))


def test_guidance_scale_0_equals_unconditional_generation(pipeline: AudioIPAdapterPipeline) -> None:
    plain = pipeline.generate_unconditional(2, seed=1)
    assert np.array_equal(plain, pipeline(TONE, 2, seed=1, guidance_scale=0.0))
    silent = pipeline(np.zeros(48_000, np.float32), 1, seed=1)
    assert silent.shape == (1, 64, 64, 3)
    assert not np.array_equal(silent, plain[:1]), "silence is not unconditional"
    with pytest.raises(ValueError, match="finite mono"):
        pipeline.encode_audio(np.zeros(0, np.float32))


def test_generation_from_text_uses_only_the_backbone(checkpoints: Path, pipeline: AudioIPAdapterPipeline) -> None:
    assert pipeline.has_text_encoder
    before = pipeline(TONE, 1, seed=2)
    generated = pipeline.generate_from_text(["a dog barks", "rain on a roof"], 2, seed=2)
    assert generated.shape == (2, 2, 64, 64, 3)
    stock = StableDiffusionPipeline.from_pretrained(checkpoints / "epsilon", safety_checker=None, local_files_only=True)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    again = stock(
        "rain on a roof", generator=latents_generator(2, 1), num_inference_steps=3, guidance_scale=2.5, height=64, width=64,
        output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(generated[1, 1] / 255 - again).max() < 0.01
    assert np.array_equal(pipeline(TONE, 1, seed=2), before), "the adapter is active again"


def test_the_audio_scale_interpolates_between_text_and_audio(pipeline: AudioIPAdapterPipeline) -> None:
    embeds = [pipeline.encode_audio(TONE)]
    beside = {
        scale: pipeline.generate_from_audio_and_text(embeds, "a dog barks", scale, 2, seed=2)[0] for scale in (0.0, 0.5, 1.0)
    }
    text_alone = pipeline.generate_from_text(["a dog barks"], 2, seed=2)[0]
    assert np.abs(beside[0.0].astype(int) - text_alone).max() <= 1
    assert np.abs(beside[1.0].astype(int) - pipeline(TONE, 2, seed=2)).max() <= 1
    assert not np.array_equal(beside[0.5], beside[0.0])
    assert not np.array_equal(beside[0.5], beside[1.0])


def test_a_backbone_without_text_encoder_generates_from_audio_only(export: Export) -> None:
    textless = AutoAudio2ImagePipeline.from_pretrained(export("textless"), "cpu")
    assert not textless.has_text_encoder
    assert textless(TONE).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="no text encoder"):
        textless.generate_from_text(["a dog"])
    with pytest.raises(ValueError, match="no text encoder"):
        textless.generate_from_audio_and_text([textless.encode_audio(TONE)], "a dog", 1.0)


def test_small_folders_are_copied_to_the_export_and_large_ones_are_referenced(
    checkpoints: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: AudioIPAdapterPipeline
) -> None:
    monkeypatch.setattr(ip_adapter, "COPY_LIMIT", 0)
    folder = export()
    assert sorted(path.name for path in folder.iterdir()) == [
        "encoder",
        "ip_adapter.safetensors",
        "model_index.json",
        "resampler",
        "scheduler",
    ]
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["backbone"]["kind"], index["encoder"]["kind"]) == ("folder", "folder")
    assert np.array_equal(AudioIPAdapterPipeline.from_pretrained(folder, "cpu")(TONE, seed=1), pipeline(TONE, seed=1))

    index["backbone"]["model"], index["encoder"]["model"] = "epsilon", "ast"  # as a project would name folders of its own
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="SONIFY_MODELS"):
        AudioIPAdapterPipeline.from_pretrained(folder, "cpu")
    monkeypatch.setenv("SONIFY_MODELS", str(checkpoints))
    assert AudioIPAdapterPipeline.from_pretrained(folder, "cpu").has_text_encoder

    other = tmp_path / "other"
    shutil.copytree(checkpoints, other)
    tensors = load_file(other / "epsilon/unet/diffusion_pytorch_model.safetensors")
    tensors["conv_in.bias"] += 1
    save_file(tensors, other / "epsilon/unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("SONIFY_MODELS", str(other))
    with pytest.raises(IntegrityError, match="have the sha256"):
        AudioIPAdapterPipeline.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("name", [IP_ADAPTER, "resampler/model.safetensors"])
def test_modified_files_of_an_export_are_rejected(exported: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    tensors = load_file(copy / name)
    key = sorted(tensors)[0]
    save_file({**tensors, key: tensors[key] + 1}, copy / name)
    with pytest.raises(IntegrityError, match="sha256"):
        AudioIPAdapterPipeline.from_pretrained(copy)
    index = json.loads((copy / "model_index.json").read_text())
    index["sha256"] = {}
    (copy / "model_index.json").write_text(json.dumps(index))
    save_file({**tensors, key: tensors[key].flatten()[:1]}, copy / name)
    with pytest.raises(IntegrityError, match="has shape"):
        AudioIPAdapterPipeline.from_pretrained(copy)
    save_file({key: tensors[key]}, copy / name)
    with pytest.raises(IntegrityError, match="is missing"):
        AudioIPAdapterPipeline.from_pretrained(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match="missing"):
        AudioIPAdapterPipeline.from_pretrained(copy)


def test_foreign_code_in_the_index_is_rejected(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    path = copy / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "PNDMScheduler"}))
    with pytest.raises(IntegrityError, match="unknown scheduler"):
        AudioIPAdapterPipeline.from_pretrained(copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(IntegrityError, match="foreign code"):
        AutoAudio2ImagePipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("file", "change", "error", "words"),
    [
        ("unet/config.json", {"addition_embed_type": "text_time"}, ConfigError, "addition_embed_type"),
        ("unet/config.json", {"in_channels": 9}, ConfigError, "inpainting"),
        ("unet/config.json", {"_class_name": "FluxTransformer2DModel"}, ConfigError, "FluxTransformer2DModel"),
        ("unet/config.json", {"cross_attention_dim": 32}, ConfigError, "width 24"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, ConfigError, "predicts sample"),
        ("text_encoder/config.json", {"model_type": "t5"}, ConfigError, "t5"),
        ("vae/config.json", {"auto_map": {"AutoModel": "evil.Model"}}, IntegrityError, "auto_map"),
        ("unet/diffusion_pytorch_model.safetensors", None, IntegrityError, "no safetensors"),
    ],
)
def test_a_checkpoint_of_another_kind_is_rejected_before_it_is_loaded(
    checkpoints: Path, tmp_path: Path, file: str, change: dict[str, object] | None, error: type[Exception], words: str
) -> None:
    shutil.copytree(checkpoints / "epsilon", tmp_path / "other")
    path = tmp_path / "other" / file
    if change is None:
        path.unlink()
        path.with_suffix(".bin").write_bytes(b"a pickle")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=words):
        StableDiffusionBackbone(str(tmp_path / "other")).fetch()


def test_weights_missing_in_the_checkpoint_are_an_error(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "epsilon", tmp_path / "incomplete")
    path = tmp_path / "incomplete/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="conv_in"):
        StableDiffusionBackbone(str(tmp_path / "incomplete")).load()


def test_the_identity_is_the_content_and_a_hub_id_requires_a_commit(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "epsilon", tmp_path / "copy")
    (tmp_path / "copy/unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant that is never read")
    assert (
        StableDiffusionBackbone("copy", root=tmp_path).describe()
        == StableDiffusionBackbone(str(checkpoints / "epsilon")).describe()
    )
    assert (
        StableDiffusionBackbone(str(checkpoints / "v_prediction")).describe()
        != StableDiffusionBackbone(str(checkpoints / "epsilon")).describe()
    )
    with pytest.raises(ConfigError, match="not a commit"):
        StableDiffusionBackbone("owner/model", "main").fetch()


def test_only_the_files_that_are_read_are_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    others = [
        "README.md",
        "model_index.json",
        "v1-5-pruned.ckpt",
        "v1-5-pruned-emaonly.safetensors",
        "safety_checker/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.bin",
    ]
    assert sorted(filter_repo_objects([*others, *wanted], allow_patterns=list(FILES))) == wanted


def test_latents_are_scaled_by_the_factor_of_the_checkpoint(checkpoints: Path) -> None:
    backbone = StableDiffusionBackbone(str(checkpoints / "epsilon")).load()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = backbone.encode(images)
    assert mean.shape == std.shape == (2, 4, 8, 8)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    distribution = backbone.vae.encode(images).latent_dist
    expected = (distribution.mean + distribution.std * noise) * backbone.vae.config.scaling_factor
    torch.testing.assert_close(backbone.sample_latents(mean, std, noise), expected)
    decoded = backbone.decode(backbone.sample_latents(mean, std, torch.zeros_like(mean)))
    torch.testing.assert_close(decoded, backbone.vae.decode(mean).sample.clamp(-1, 1), atol=1e-4, rtol=1e-3)
