"""`sonify export`: write the pairs as a publishable data set, or a model with its card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, progress_bar
from pipeline_steps.core.errors import ConfigError

if TYPE_CHECKING:
    from pipeline_steps.core.project_paths import ProjectPaths


@handle_errors
def export(
    context: typer.Context,
    webdataset: Annotated[
        Path | None, typer.Option("--webdataset", metavar="DIR", help="New folder for the pairs as WebDataset shards.")
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option("--hf", metavar="DIR", help="New folder for the pairs as Parquet with images and audio, for `datasets`."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="New folder for the model with its card and evaluation.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="With --model: version, alias or run in the registry; default: the project's model.")
    ] = None,
    license: Annotated[
        list[str] | None, typer.Option(help="Only items under this SPDX id; may be repeated. For data sets.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="For your own use: every pair, whatever its license; marked in the card.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload the folder to this repository of the hub; asks first.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --push: do not ask.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the pairs that may be published, or the model, with card, licenses and evaluation; --push uploads the folder."""
    targets = {"--webdataset": webdataset, "--hf": hf, "--model": model}
    chosen = {name: folder for name, folder in targets.items() if folder is not None}
    if len(chosen) != 1:
        raise ConfigError(f"{' and '.join(chosen) or 'nothing'} to export", "give one of --webdataset, --hf and --model")
    ((target, folder),) = chosen.items()
    if version is not None and target != "--model":
        raise ConfigError(f"--version {version} belongs to --model", "leave it out")
    if license and target == "--model":
        raise ConfigError("--license selects pairs of a data set, not a model", "leave it out")
    if push and as_json and not yes:
        raise ConfigError("--json cannot ask for confirmation", "add --yes")
    layout = layout_of(context)
    if target == "--model":
        value, lines = _write_model(layout, folder, version, private, publish=bool(push))
    else:
        value, lines = _write_dataset(layout, folder, target, license or None, private)
    if push:
        from pipeline_steps.commands.hub_push import push_folder

        if not yes:
            print("\n".join(lines))
            lines = []
            typer.confirm(f"upload {folder} to {'the private repository ' if private else ''}{push}?", abort=True)
        value["repository"] = push_folder(folder, push, "model" if target == "--model" else "dataset", private)
        lines.append(f"uploaded to {value['repository']}")
    print_result(value, lines, as_json)


def _write_dataset(
    layout: ProjectPaths, folder: Path, target: str, licenses: list[str] | None, private: bool
) -> tuple[dict[str, Any], list[str]]:
    from pipeline_steps.pair.release.export import export_parquet, export_webdataset

    write = export_webdataset if target == "--webdataset" else export_parquet
    release = write(layout, folder, licenses=licenses, private=private, progress=lambda pairs: progress_bar(pairs, "pairs"))
    lines = [f"{sum(release.pairs.values())} pairs in {len(release.shards)} files: {folder}"]
    lines += [f"left out, {code}: {count}" for code, count in release.left_out.items() if count]
    lines += [f"no license text for {name}" for name in release.licenses_without_text]
    lines += ["private: the card says that this set may not be published"] if private else []
    return asdict(release), lines


def _write_model(
    layout: ProjectPaths, folder: Path, version: str | None, private: bool, publish: bool
) -> tuple[dict[str, Any], list[str]]:
    from pipeline_steps.commands.model_export import export_model

    exported = export_model(layout, folder, version, private, publish)
    lines = [f"model {exported.md5} ({exported.files} files, {exported.results} results on the card): {folder}"]
    lines.append(f"license of the backbone: {exported.backbone_license}")
    if not exported.data_licenses:
        lines.append("the licenses of the training data are not known: data/pairs is not what this model was trained on")
    elif exported.unpublishable_pairs:
        lines.append(f"{exported.unpublishable_pairs} training pairs have a work that may not be published")
    return asdict(exported), lines
