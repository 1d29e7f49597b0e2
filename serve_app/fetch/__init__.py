"""Models on disk: the demo and the reference model, which are made here, and checkpoints from the Hugging Face hub."""

from serve_app.fetch.demo import demo_folder, fetch_demo
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import Report, progress_bar, silent
from serve_app.fetch.reference import fetch_reference, reference_folder

__all__ = [
    "Report",
    "demo_folder",
    "fetch_demo",
    "fetch_reference",
    "progress_bar",
    "reference_folder",
    "resolve",
    "silent",
]
