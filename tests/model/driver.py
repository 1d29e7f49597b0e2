"""Drives a whole model in one process, slice by slice, with pages scattered at random over the pool."""

import itertools
import random

import torch

from serve_app.engine.plan import Plan, Sample, Slice
from serve_app.model.batch import Batch
from serve_app.model.moe import ExpertHost, LocalExperts
from serve_app.model.stage import Stage
from serve_app.runtime.threads import ThreadGroup

CPU = torch.device("cpu")
GREEDY = Sample(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0, logprob=False)


class Sequence:
    """The pages of one sequence and how many of its tokens are computed."""

    def __init__(self, pages):
        self.pages = pages
        self.num_computed = 0


class Driver:
    """`num_stages` stages of a model, one after another, and all its experts, on CPU. Each shard is a thread."""

    def __init__(self, weights, dtype=torch.float32, num_pages=256, page_tokens=16, num_stages=1, num_shards=1, seed=0):
        self.group = ThreadGroup(num_shards)
        spec = weights.spec
        bounds = [spec.num_layers * i // num_stages for i in range(num_stages + 1)]
        self.stages = [
            [
                Stage.load(
                    weights,
                    range(begin, end),
                    num_pages=num_pages,
                    page_tokens=page_tokens,
                    dtype=dtype,
                    device=CPU,
                    num_shards=num_shards,
                    shard=shard,
                )
                for begin, end in itertools.pairwise(bounds)
            ]
            for shard in range(num_shards)
        ]
        host = ExpertHost(spec, dtype, CPU)
        for layer, expert in itertools.product(range(spec.num_layers), range(spec.num_experts)):
            host.load(weights, layer, expert)
        self.experts = LocalExperts(host)
        self.page_tokens = page_tokens
        self._free = list(range(num_pages))
        self._random = random.Random(seed)

    def begin(self, num_tokens):
        """A sequence with room for `num_tokens`, on pages drawn at random from the free ones."""
        num_pages = -(-num_tokens // self.page_tokens)
        drawn = self._random.sample(self._free, num_pages)
        self._free = [page for page in self._free if page not in drawn]
        return Sequence(drawn)

    def end(self, sequence):
        self._free.extend(sequence.pages)

    def step(self, parts):
        """Run [(sequence, tokens)] as one step and return the logits after each part's last token."""
        slices = []
        for sequence, tokens in parts:
            stop = sequence.num_computed + len(tokens)
            pages = sequence.pages[: -(-stop // self.page_tokens)]
            slices.append(Slice(sequence.num_computed, list(tokens), pages, GREEDY))
            sequence.num_computed = stop
        batch = Batch.from_plan(Plan(0, 0, 0, slices), self.page_tokens, CPU)
        return self.group.run(lambda shard: self._forward(batch, shard))[0]

    def _forward(self, batch, shard):
        x = None
        for stage in self.stages[shard]:
            x = stage.forward(batch, x, self.experts, self.group.shards[shard])
        return x

    def rows(self, tokens, chunks):
        """Logits after each chunk of one sequence, computed alone."""
        sequence = self.begin(len(tokens))
        logits = []
        for size in chunks:
            begin = sequence.num_computed
            logits.append(self.step([(sequence, tokens[begin : begin + size])])[0])
        self.end(sequence)
        return torch.stack(logits)
