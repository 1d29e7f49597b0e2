"""From what a user calls a model to a folder with its checkpoint."""

import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub

from serve_app.errors import FetchError
from serve_app.fetch.cache import is_whole
from serve_app.fetch.demo import demo_folder, fetch_demo
from serve_app.fetch.progress import Report
from serve_app.fetch.reference import fetch_reference, reference_folder

_FILES = ["*.json", "*.safetensors", "*.jinja"]  # never a pickle
_MADE: dict[str, tuple[Callable[[], Path], Callable[..., Path]]] = {  # where it is in the cache, what makes it
    "demo": (demo_folder, fetch_demo),
    "reference": (reference_folder, fetch_reference),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str, report: Report, *, fetch: bool = True, verify: bool = False) -> Path:
    """The folder of `model`: "demo", "reference", a folder, or a hub id "organisation/name".

    What is not on this machine is downloaded, or made, if `fetch`. `verify` also checks every byte of a model that we
    made. Raises FetchError with a sentence that says what to do.
    """
    if model in _MADE:
        return _made(model, report, fetch, verify)
    if verify:
        raise FetchError(f"--verify is for the demo model and the reference model: no hashes are known of {model}")
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(model):
        raise FetchError(
            f'model {model!r} is neither "demo", nor "reference", nor a folder, nor a hub id "organisation/name"'
        )
    return _from_hub(model, fetch)


def _made(model: str, report: Report, fetch: bool, verify: bool) -> Path:
    folder, fetch_model = _MADE[model]
    if fetch:
        return fetch_model(report, verify=verify)
    if not is_whole(folder()):
        raise FetchError(f"the {model} model is not in the cache: run `octavo fetch {model}`")
    return folder()


def _from_hub(model: str, fetch: bool) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_FILES, local_files_only=not fetch))
    except Exception as error:  # the hub's errors, its transport's and the file system's: one sentence for all
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FetchError(f"model {model!r} could not be had from the Hugging Face hub: {why}") from error
