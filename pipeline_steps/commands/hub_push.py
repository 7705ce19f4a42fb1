"""Upload of an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline_steps.core.errors import ConfigError, ServiceError


def push_folder(folder: Path, repository: str, kind: str, private: bool) -> str:
    """Upload a folder as one commit; the repository is created if it does not exist. Returns its address.

    Args:
        repository: `owner/name`.
        kind: `dataset` or `model`.
        private: upload to a private repository only; else an existing repository keeps its visibility.

    Raises:
        ConfigError: the hub refuses the token or the name, or the repository is public and `private` is set.
        ServiceError: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="seeing-sound")
    try:
        address = api.create_repo(repository, repo_type=kind, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository, repo_type=kind).private:
            raise ConfigError(f"{address} is public; a private export is not uploaded to it", "name a private repository")
        api.upload_folder(
            repo_id=repository, repo_type=kind, folder_path=folder, commit_message=f"Export of {folder.name} by sonify"
        )
    except HFValidationError as error:
        raise ConfigError(f"--push {repository}: {error}", "write OWNER/NAME") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if 400 <= status < 500 and status != 429:
            raise ConfigError(
                f"the hub refuses {repository} ({status}): {error.server_message or 'no reason given'}",
                "log in with `hf auth login` or set HF_TOKEN to a token that may write there",
            ) from error
        raise ServiceError(f"the hub answers {status or 'nothing'} for {repository}", "try again", transient=True) from error
    except Exception as error:  # the errors of the HTTP library that huggingface_hub uses, which changes between releases
        if isinstance(error, ConfigError):
            raise
        raise ServiceError(
            f"{repository} was not uploaded: {type(error).__name__}: {error}", "check the connection, try again", transient=True
        ) from error
    return str(address)
