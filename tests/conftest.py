"""Shared fixtures: isolation from the developer's services, real weights, tiny real data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before any heavy import: two pytest workers on two cores must not start four threads each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DO_NOT_TRACK"] = "1"
os.environ["DVC_NO_ANALYTICS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["PREFECT_API_URL"] = ""
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ["SONIFY_TRACKING"] = "off"  # tests of tracking switch it on

import hypothesis
import pytest
from filelock import FileLock

# A loaded machine is no defect: no deadline per example.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_store_of_another_test() -> Iterator[None]:
    """MLflow writes the address it was given into the environment of the process: it must not outlive its test."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def project() -> Path:
    """Root of the repository."""
    return PROJECT


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo data set: images, sounds, manifest."""
    return PROJECT / "data/demo"


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real pretrained weights, fetched once (they are pinned by hash) and shared by all test workers."""
    from pipeline_steps.__main__ import run_stage
    from pipeline_steps.core.project_paths import ProjectPaths

    layout = ProjectPaths(PROJECT)
    (PROJECT / ".cache").mkdir(exist_ok=True)
    with FileLock(PROJECT / ".cache/assets.lock"):
        if not (layout.assets / "meta.json").is_file():
            run_stage("assets", layout)
    return layout.assets


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised MLflow database without runs, made once for all test workers (its migrations take seconds)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = shared / "empty-mlflow.db"
    with FileLock(shared / "empty-mlflow.lock"):
        if not path.exists():
            import mlflow

            making = shared / "making.db"
            client = mlflow.MlflowClient(f"sqlite:///{making}")
            client.search_experiments()
            making.rename(path)
    return path


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text-to-image checkpoint."""
    from tests.factories.checkpoints.stable_diffusion import small_backbone

    return small_backbone(tmp_path_factory.mktemp("frozen") / "backbone")


def export_small_model(folder: Path, backbone: Path, assets: Path, prompt: str = "{}") -> Path:
    """Write a small model in the layout that stage `train` exports; its weights are far from where training begins."""
    import torch

    from pipeline_steps.diffusion.audio_prompt import AudioPrompt
    from pipeline_steps.diffusion.audio_tokens import YamnetTokenizer
    from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
    from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
    from pipeline_steps.diffusion.pipelines.base import GenerationConfig
    from pipeline_steps.diffusion.pipelines.ip_adapter import AudioIPAdapterPipeline, save_adapter
    from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
    from pipeline_steps.models.audio.yamnet import YamNet

    torch.manual_seed(0)
    frozen, encoder = StableDiffusionBackbone(str(backbone)).load(), YamnetTokenizer(YamNet(assets), YamNet(assets))
    resampler = PerceiverResampler(encoder.width, encoder.bands, 2, frozen.width, dim=16, depth=1, heads=2)
    adapter = AudioIPAdapter(frozen, resampler, AudioPrompt(prompt))
    with torch.no_grad():
        for weight in adapter.parameters():
            weight += 0.3 * torch.randn(weight.shape)
    generation_config = GenerationConfig(num_inference_steps=2, guidance_scale=2.0, max_seconds=2.0, resolution=32)
    pipeline = AudioIPAdapterPipeline(adapter, frozen.build_scheduler("dpm++"), None, generation_config)
    save_adapter(folder, pipeline, encoder, assets)
    return folder


@pytest.fixture(scope="session")
def exported_model(assets: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small exported model whose backbone has a text encoder."""
    return export_small_model(tmp_path_factory.mktemp("model") / "audio2image", backbone, assets)


@pytest.fixture(scope="session")
def textless_model(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small exported model whose backbone has no text encoder."""
    from tests.factories.checkpoints.stable_diffusion import stable_diffusion

    folder = tmp_path_factory.mktemp("textless")
    backbone = stable_diffusion(folder / "backbone", text="", levels=2)
    return export_small_model(folder / "audio2image", backbone, assets, prompt="")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole-demo test first: it is the longest, and the other worker takes the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
