"""What a user calls a model becomes a folder, or one sentence."""

import pytest

from serve_app.errors import FetchError
from serve_app.fetch import resolve, silent


def test_a_folder_is_itself(tmp_path):
    assert resolve(str(tmp_path), silent) == tmp_path


@pytest.mark.parametrize("model", ["demo", "reference"])
def test_what_is_not_made_yet_says_how_to_get_it(monkeypatch, tmp_path, model):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match=f"run `octavo fetch {model}`"):
        resolve(model, silent, fetch=False)


def test_only_what_we_made_can_be_verified(tmp_path):
    with pytest.raises(FetchError, match="no hashes are known of"):
        resolve(str(tmp_path), silent, verify=True)


def test_the_cached_demo_is_found(demo_folder):
    assert resolve("demo", silent, fetch=False) == demo_folder


@pytest.mark.parametrize("model", ["", "nowhere", "/no/such/folder", "a/b/c", "org/name; rm"])
def test_what_names_nothing_is_one_sentence(model):
    with pytest.raises(FetchError, match="is neither"):
        resolve(model, silent)


def test_a_hub_model_that_is_not_here_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match="'org/name' could not be had from the Hugging Face hub") as caught:
        resolve("org/name", silent, fetch=False)
    assert "\n" not in str(caught.value)
