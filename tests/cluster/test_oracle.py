"""Twenty prompts through four workers, through one process, and through transformers, on the demo model."""

import pytest
import torch
import transformers

from serve_app.model.tokenizer import Tokenizer
from tests.cluster.prompts import QUESTIONS
from tests.cluster.server import Server
from tests.cluster.test_serve import ARGS, ask_all, ask_local

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_TOKENS = 32


def ask_transformers(folder, dtype):
    tokenizer = Tokenizer.load(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    answers = {}
    for question in QUESTIONS:
        prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
        with torch.inference_mode():
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)
        answers[question] = ids[0, len(prompt) :].tolist()
    return answers


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def answers(request, demo_folder, tmp_path_factory):
    """dtype, and the answers of the cluster, of one process and of transformers."""
    with Server(tmp_path_factory.mktemp("oracle"), ARGS | {"dtype": request.param}) as server:
        cluster = ask_all(server, max_new_tokens=NUM_TOKENS)
    local = ask_local(demo_folder, NUM_TOKENS, dtype=request.param)
    return request.param, cluster, local, ask_transformers(demo_folder, getattr(torch, request.param))


def test_the_executors_agree(answers):
    _, cluster, local, _ = answers
    assert cluster == local


def test_transformers_agrees(answers):
    """In fp32 to the token; in bf16, where it rounds elsewhere than we do, the rate is printed."""
    dtype, _, local, oracle = answers
    num_same = sum(local[question] == oracle[question] for question in QUESTIONS)
    first = sum(local[question][0] == oracle[question][0] for question in QUESTIONS)
    print(f"{dtype}: {num_same} of {len(QUESTIONS)} answers the same to the last token, {first} to the first")
    if dtype == "float32":
        assert local == oracle
