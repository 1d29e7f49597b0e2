"""Where the time of a step goes: decode at several batch sizes, and one prefill, on random weights.

    python benchmarks/step_breakdown.py [--threads 2] [--layers 16] [--batch 1 8 32 64]

The model is a qwen3_moe of the reference shape: 16 layers, 16 experts, top-2, hidden 512, expert hidden 1024,
vocabulary 49152, 8 heads of 64, in the dtype that this machine is best at.
"""

import argparse
import random
import statistics
import time
from dataclasses import dataclass

import torch

from serve_app.engine.plan import Plan, Sample, Slice
from serve_app.model.batch import Batch
from serve_app.model.cpu import pick_dtype
from serve_app.model.moe import ExpertHost, LocalExperts
from serve_app.model.random_weights import random_checkpoint
from serve_app.model.sampling import sample
from serve_app.model.spec import ModelSpec, RopeSpec
from serve_app.model.stage import Stage, load_experts
from serve_app.model.timing import StepTimer

PAGE_TOKENS = 16
PROMPT_TOKENS = 128
NUM_DECODE_STEPS = 64
PREFILL_TOKENS = 1024
GREEDY = Sample(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0, logprob=False)


def reference_spec(num_layers: int) -> ModelSpec:
    return ModelSpec(
        family="qwen3_moe",
        vocab_size=49152,
        hidden_size=512,
        num_layers=num_layers,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        num_experts=16,
        top_k=2,
        expert_size=1024,
        norm_topk=True,
        max_positions=4096,
        norm_eps=1e-6,
        rope=RopeSpec(),
        tie_embeddings=False,
        qk_norm="head",
    )


@dataclass
class Result:
    name: str
    step_s: float
    tokens_per_s: float
    shares: dict[str, float]

    def __str__(self) -> str:
        shares = "".join(f"{self.shares[part]:>11.0%}" for part in ("attention", "experts", "head", "other"))
        return f"{self.name:<16}{self.step_s * 1e3:>9.1f}{self.tokens_per_s:>10.0f}{shares}"


class Bench:
    def __init__(self, num_layers: int, num_sequences: int) -> None:
        weights = random_checkpoint(reference_spec(num_layers))
        spec, device = weights.spec, torch.device("cpu")
        dtype = pick_dtype(device)
        self.timer = StepTimer()
        self.pages_each = (PROMPT_TOKENS + NUM_DECODE_STEPS) // PAGE_TOKENS
        num_pages = max(num_sequences * self.pages_each, PREFILL_TOKENS // PAGE_TOKENS)
        self.pool = random.Random(0).sample(range(num_pages), num_pages)
        self.stage = Stage.load(
            weights,
            range(num_layers),
            num_pages=num_pages,
            page_tokens=PAGE_TOKENS,
            dtype=dtype,
            device=device,
            timer=self.timer,
        )
        host = ExpertHost(spec, dtype, device)
        load_experts(weights, host, [(la, e) for la in range(num_layers) for e in range(spec.num_experts)])
        self.experts = LocalExperts(host)

    def step(self, slices: list[Slice]) -> list[int]:
        batch = Batch.from_plan(Plan(0, 0, 0, slices), PAGE_TOKENS, self.stage.device)
        logits = self.stage.forward(batch, None, self.experts)
        return sample(logits, [part.sample for part in slices if part.sample])[0]

    def decode(self, num_sequences: int) -> Result:
        pages = [self.pool[i * self.pages_each :][: self.pages_each] for i in range(num_sequences)]
        dice = random.Random(1)
        tokens = [0] * num_sequences
        for i, own in enumerate(pages):
            prompt = [dice.randrange(49152) for _ in range(PROMPT_TOKENS)]
            [tokens[i]] = self.step([Slice(0, prompt, own, GREEDY)])
        self.timer.seconds = dict.fromkeys(self.timer.seconds, 0.0)
        seconds = []
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + NUM_DECODE_STEPS):
            begun_s = time.perf_counter()
            tokens = self.step([Slice(position, [tokens[i]], own, GREEDY) for i, own in enumerate(pages)])
            seconds.append(time.perf_counter() - begun_s)
        return self._result(f"decode {num_sequences}", num_sequences, seconds)

    def prefill(self) -> Result:
        dice = random.Random(2)
        part = Slice(0, [dice.randrange(49152) for _ in range(PREFILL_TOKENS)], self.pool, GREEDY)
        self.step([part])
        self.timer.seconds = dict.fromkeys(self.timer.seconds, 0.0)
        seconds = []
        for _ in range(5):
            begun_s = time.perf_counter()
            self.step([part])
            seconds.append(time.perf_counter() - begun_s)
        return self._result(f"prefill {PREFILL_TOKENS}", PREFILL_TOKENS, seconds)

    def _result(self, name: str, num_tokens: int, seconds: list[float]) -> Result:
        """Median step; shares of the sum, with batch building and sampling in "other"."""
        total = sum(seconds)
        shares = {part: spent / total for part, spent in self.timer.seconds.items()}
        shares["other"] += 1 - sum(shares.values())
        step_s = statistics.median(seconds)
        return Result(name, step_s, num_tokens / step_s, shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32, 64])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.layers, max(args.batch, default=1))
    print(f"{'':<16}{'ms/step':>9}{'tokens/s':>10}{'attention':>11}{'experts':>11}{'head':>11}{'other':>11}")
    for num_sequences in args.batch:
        print(bench.decode(num_sequences), flush=True)
    print(bench.prefill(), flush=True)


if __name__ == "__main__":
    main()
