"""How a request is known to the engine."""

from serve_app.engine.request import SamplingParams
from serve_app.ingress.door import Prompt, new_job


def test_the_engine_s_name_follows_from_all_that_makes_the_answer():
    prompt, sampling = Prompt([1, 2, 3], "text"), SamplingParams(seed=5)
    jobs = [
        new_job("r", prompt, sampling, ("a", "b")),
        new_job("r_0", prompt, sampling, ("a", "b")),
        new_job("r", Prompt([1, 2], "text"), sampling, ("a", "b")),
        new_job("r", prompt, SamplingParams(seed=6), ("a", "b")),
        new_job("r", prompt, SamplingParams(seed=5, top_k=1), ("a", "b")),
        new_job("r", prompt, sampling, ("ab",)),
        new_job("r", prompt, sampling, ()),
    ]
    names = [job.request.rid for job in jobs]
    assert len(set(names)) == len(names)
    again = new_job("r", prompt, sampling, ("a", "b"), skip_special_tokens=False)
    assert again.request.rid == names[0]
    assert len(names[0]) == 32
