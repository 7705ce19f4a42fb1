"""The rules of the house (docs/explanation/architecture.md), held by the syntax tree rather than by hope."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline_steps.__main__ import STAGES
from pipeline_steps.core.config import config_class
from pipeline_steps.core.source_files import imported_files, imported_names

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "pipeline_steps"
SHARED = ("core", "audio", "models", "diffusion")
GRAPH = YAML(typ="safe").load((PROJECT / "dvc.yaml").read_text())["stages"]
PARAMS = YAML(typ="safe").load((PROJECT / "params.yaml").read_text())

# Which first-party packages a package may import. Tracking only watches: it never shapes an out.
ALLOWED: dict[str, set[str]] = {
    "core": {"core"},
    "audio": {"core", "audio"},
    "models": {"core", "audio", "models"},
    "diffusion": {"core", "audio", "models", "diffusion"},
    "tracking": {"core", "audio", "models", "diffusion", "tracking"},
    **{stage: {*SHARED, stage} for stage in STAGES},
}
for watched in ("pair", "train", "evaluate"):
    ALLOWED[watched].add("tracking")


def modules(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def first_party(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("pipeline_steps.") and name.count(".")}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_dependency_direction(package: str) -> None:
    for path in modules(PACKAGE / package):
        packages = {name for name in first_party(path) if (PACKAGE / name).is_dir()}
        assert packages <= ALLOWED[package], f"{path.relative_to(PROJECT)} imports {sorted(packages - ALLOWED[package])}"


def test_nothing_imports_flows_and_tools_have_one_importer() -> None:
    owner = {
        "mlflow": "pipeline_steps/tracking/",
        "prefect": "flows/",
        "dvc": "flows/dvc_graph.py",
        "ray": "pipeline_steps/core/executors/ray.py",
    }
    for path in [*modules(), *modules(PROJECT / "flows")]:
        where = path.relative_to(PROJECT).as_posix()
        for name in imported_names(path):
            top = name.split(".")[0]
            assert top != "flows" or where.startswith("flows/"), f"{where} imports flows"
            assert top != "pytorch_lightning", f"{where}: import lightning.pytorch, its twin is another package"
            if top in owner:
                assert where.startswith(owner[top]), f"{where} imports {top}; only {owner[top]} may"


def registered(stage: str) -> list[str]:
    """Modules of the implementations that a stage looks up by name."""
    packages = {registry.package for registry in config_class(stage).registries.values()}
    return [f"{package}.{path.stem}" for package in packages for path in PROJECT.joinpath(*package.split(".")).glob("[!_]*.py")]


def reachable(stage: str) -> list[Path]:
    """Files that a stage imports, directly or through others, tracking left out; packages without code left out."""
    files = imported_files(f"pipeline_steps.{stage}.stage", *registered(stage), skip=["pipeline_steps.tracking"])
    return [path for path in files if path.name != "__init__.py" or has_code(path)]


def has_code(path: Path) -> bool:
    """Whether a file holds more than a docstring."""
    tree = ast.parse(path.read_text())
    return len(tree.body) > (ast.get_docstring(tree) is not None)


@pytest.mark.parametrize("stage", STAGES)
def test_imports_of_a_stage_are_covered_by_its_deps(stage: str) -> None:
    deps = [PROJECT / dep for dep in GRAPH[stage]["deps"] if not dep.startswith("${")]
    for path in reachable(stage):
        covered = path == PACKAGE / "__init__.py" or any(dep == path or dep in path.parents for dep in deps)
        assert covered, f"{stage} imports {path.relative_to(PROJECT)}, which dvc.yaml does not list among its deps"


@pytest.mark.parametrize("stage", STAGES)
def test_declared_code_deps_are_used(stage: str) -> None:
    used = reachable(stage)
    for dep in GRAPH[stage]["deps"]:
        if dep.startswith("pipeline_steps/"):
            code = (PROJECT / dep).with_suffix(".py") if dep.endswith(".csv") else PROJECT / dep  # a table and its reader
            assert any(code == path or code in path.parents for path in used), f"{stage}: {dep} is not used"


def test_the_graph_and_the_stages_are_the_same_set() -> None:
    assert tuple(GRAPH) == STAGES
    assert set(PARAMS) == set(STAGES)
    for stage, node in GRAPH.items():
        assert node["cmd"] == f"python -m pipeline_steps {stage}"
        assert node["params"] == [stage]


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_exactly_the_config_model(stage: str) -> None:
    config = config_class(stage).with_groups(PARAMS[stage])
    unused = {"pools", "link_roots"} if stage == "ingest" else set()  # of the other form: several sources instead of one root
    assert set(PARAMS[stage]) | unused == set(config.model_fields), "every key of the model is written out in params.yaml"
    config.model_validate(PARAMS[stage])


DISK_NAMES = {
    "open", "read_bytes", "read_text", "write_bytes", "write_text", "write_json", "read_table", "write_table", "atomic_path",
    "write_shards", "write_index", "mkdir", "unlink", "iterdir", "glob", "rglob", "rmtree", "MediaShardReader", "ResultCache",
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_only_step_touches_the_disk(stage: str) -> None:
    for path in modules(PACKAGE / stage):
        if path.name in DISK_MODULES.get(stage, {"stage.py"}):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                function = node.func
                name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
                owner = function.value if isinstance(function, ast.Attribute) else None
                if name == "open" and isinstance(owner, ast.Name) and owner.id == "Image":
                    continue  # Pillow opens bytes in memory too
                assert name not in DISK_NAMES, f"{path.relative_to(PROJECT)}:{node.lineno} calls {name}"


# Modules other than stage.py that read or write files, each because that is the one thing it is for.
DISK_MODULES: dict[str, set[str]] = {
    "caption": {"stage.py", "lexicon.py"},  # the lexicon is data of the package
    "train": {"stage.py", "checkpoint_io.py"},  # the format of checkpoints, for Lightning
    "pair": {"stage.py", "export.py"},  # `sonify export` writes a published set, long after the stage
    "evaluate": {"stage.py", "convert_inception.py", "inception.py"},  # a judge's checkpoint folder and its converter
}


def test_every_parquet_out_has_a_contract() -> None:
    from pipeline_steps.core import schemas

    names = {value.name for value in vars(schemas).values() if isinstance(value, schemas.TableSchema)}
    written = set()
    for path in modules():
        written |= set(re.findall(r"(?<!pyarrow\.)\b([a-z_]+)\.parquet\b", path.read_text()))
    assert written <= names | {"index", "pyarrow"}, f"no contract for {sorted(written - names)}"


def test_files_stay_small() -> None:
    sizes = {path: sum(1 for line in path.read_text().splitlines() if line.strip()) for path in modules()}
    large = {str(path.relative_to(PROJECT)): size for path, size in sizes.items() if size > 400}
    assert not large, large


def test_configs_and_core_stay_light() -> None:
    heavy = {"torch", "transformers", "lightning", "diffusers", "mlflow", "prefect"}
    for path in [*modules(PACKAGE / "core"), *PACKAGE.glob("*/config.py"), PACKAGE / "cli.py", PACKAGE / "__init__.py"]:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            assert not heavy & {name.split(".")[0] for name in names}, f"{path.relative_to(PROJECT)} imports something heavy"
