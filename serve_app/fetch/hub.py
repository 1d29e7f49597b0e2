"""From what a user calls a model to a folder with its checkpoint."""

import re
from pathlib import Path

import huggingface_hub

from serve_app.errors import FetchError
from serve_app.fetch.demo import demo_folder, fetch_demo, has_demo
from serve_app.fetch.progress import Report

_FILES = ["*.json", "*.safetensors", "*.jinja"]  # never a pickle
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str, report: Report, *, fetch: bool = True) -> Path:
    """The folder of `model`: "demo", a folder, or a hub id "organisation/name".

    What is not on this machine is downloaded if `fetch`. Raises FetchError with a sentence that says what to do.
    """
    if model == "demo":
        return _demo(report, fetch)
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(model):
        raise FetchError(f'model {model!r} is neither "demo", nor a folder, nor a hub id "organisation/name"')
    return _from_hub(model, fetch)


def _demo(report: Report, fetch: bool) -> Path:
    if fetch:
        return fetch_demo(report)
    if not has_demo():
        raise FetchError("the demo model is not in the cache: run `octavo fetch demo`")
    return demo_folder()


def _from_hub(model: str, fetch: bool) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_FILES, local_files_only=not fetch))
    except Exception as error:  # the hub's errors, its transport's and the file system's: one sentence for all
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FetchError(f"model {model!r} could not be had from the Hugging Face hub: {why}") from error
