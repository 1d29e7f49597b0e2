"""What follows from declared figures: the models they may be about, and the planner's objects made of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from serve_app.errors import PlanError
from serve_app.experts.layout import stage_layers
from serve_app.model.spec import ModelSpec, RopeSpec
from serve_app.plan.audit.declared import Declared
from serve_app.plan.audit.readings import Judgement
from serve_app.plan.bounds import Bounds
from serve_app.plan.counts import DTYPE_BYTES, Precision, count_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.footprint import Footprint, footprint, kv_gpu_token_bytes
from serve_app.plan.system import Efficiency, System

HEAD_DIMS = (128, 64, 32)  # the first that goes, where heads are not declared
DEFAULT_VOCAB = 32_000
CHUNK_TOKENS = 8192
_OTHER_WIDTHS = (2, 3, 4)  # expert widths over hidden sizes that are usual
LARGEST_ERROR = 0.1  # of a declared number of parameters, beyond which it is another model's


class UndeclaredError(Exception):
    """A check needs a figure that is not declared."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


@dataclass(frozen=True)
class Sized:
    """A model of certain sizes. `against`: the declared figure that they contradict."""

    name: str
    spec: ModelSpec
    against: str = ""


def distinct(models: Iterable[Sized | None]) -> list[Sized]:
    """Each once, in their order."""
    found: list[Sized] = []
    for sized in models:
        if sized is not None and sized not in found:
            found.append(sized)
    return found


@dataclass(frozen=True)
class Facts:
    """Raises UndeclaredError for what is not declared, PlanError for what cannot be laid out at all."""

    declared: Declared

    def given(self, field: str) -> bool:
        """Whether a figure is declared, or any of a section."""
        section, _, name = field.partition(".")
        figures = getattr(self.declared, section)
        return getattr(figures, name) is not None if name else bool(figures.model_fields_set)

    def shown(self, field: str) -> str:
        """What is declared, as it is."""
        section, _, name = field.partition(".")
        figures = getattr(self.declared, section)
        return str(getattr(figures, name)) if name else ", ".join(sorted(figures.model_fields_set))

    def number(self, field: str) -> float:
        if not self.given(field):
            raise UndeclaredError(field)
        section, name = field.split(".")
        return float(getattr(getattr(self.declared, section), name))

    def count(self, field: str) -> int:
        return int(self.number(field))

    # -- models -----------------------------------------------------------------------------------------------------

    @cached_property
    def num_experts(self) -> int:
        """Of a layer."""
        if not self.given("model.experts_per_layer") and self.given("model.total_experts"):
            return max(1, self.count("model.total_experts") // self.count("model.layers"))
        return self.count("model.experts_per_layer")

    @cached_property
    def top_ks(self) -> tuple[int, ...]:
        """The declared number of experts of a token, or those that are usual."""
        found = (self.count("model.top_k"),) if self.given("model.top_k") else (1, 2)
        if self.given("model.top_k") and found[0] > self.num_experts:
            raise PlanError(f"model.top_k = {found[0]} exceeds the {self.num_experts} experts of a layer.")
        return tuple(top_k for top_k in found if top_k <= self.num_experts)

    @cached_property
    def as_declared(self) -> Sized:
        hidden, width = self.count("model.hidden"), self.count("model.expert_hidden")
        return Sized(f"the declared sizes {hidden}/{width}", self._spec(hidden, width))

    @cached_property
    def launched(self) -> Sized | None:
        """The model of the launch line, where that has another hidden size."""
        if not self.given("launch.hidden") or self.count("launch.hidden") == self.count("model.hidden"):
            return None
        hidden = self.count("launch.hidden")
        return Sized(f"the launch line's hidden size {hidden}", self._spec(hidden, self.count("model.expert_hidden")))

    @cached_property
    def scaled(self) -> Sized | None:
        """The declared sizes, each times the same, so that the declared number of parameters is in them."""
        hidden, width = self.count("model.hidden"), self.count("model.expert_hidden")
        num_experts = self.count("model.layers") * self.num_experts
        wide = (self.number("model.total_params_b") * 1e9 / (3 * num_experts * width / hidden)) ** 0.5
        found = self._of_width(wide, width / hidden, "model.hidden and model.expert_hidden")
        total = self.number("model.total_params_b") * 1e9
        return found if found and abs(count_params(found.spec).total / total - 1) <= LARGEST_ERROR else None

    @cached_property
    def others(self) -> list[Sized]:
        """Sizes of another proportion that have the declared number of parameters to 1 %."""
        total, found = self.number("model.total_params_b") * 1e9, []
        instances = 3 * self.count("model.layers") * self.num_experts
        for ratio in _OTHER_WIDTHS:
            other = self._of_width((total / (instances * ratio)) ** 0.5, ratio, "model.hidden and model.expert_hidden")
            if other and abs(count_params(other.spec).total / total - 1) <= 0.01:
                found.append(other)
        return found

    @cached_property
    def working(self) -> Sized:
        """What rates and bytes are computed of: the declared sizes unless the number of parameters contradicts them."""
        if not self.given("model.total_params_b"):
            return self.as_declared
        total = count_params(self.as_declared.spec).total
        if abs(total / (self.number("model.total_params_b") * 1e9) - 1) <= LARGEST_ERROR:
            return self.as_declared
        return self.scaled or self.as_declared

    @cached_property
    def models(self) -> list[Sized]:
        return distinct([self.as_declared, self.launched, self.working])

    @property
    def specs(self) -> list[ModelSpec]:
        """The working model with each number of experts of a token."""
        return [replace(self.working.spec, top_k=top_k) for top_k in self.top_ks]

    def _of_width(self, wide: float, ratio: float, against: str) -> Sized | None:
        """With a hidden size of whole heads, the nearest; None where these are fewer than the shards."""
        num_heads = round(wide / self._head_dim)
        if num_heads < (self.count("layout.tp") if self.given("layout.tp") else 1):
            return None
        hidden = num_heads * self._head_dim
        return Sized(f"sizes {hidden}/{round(hidden * ratio)}", self._spec(hidden, round(hidden * ratio)), against)

    def _spec(self, hidden: int, width: int) -> ModelSpec:
        heads = max(1, hidden // self._head_dim)
        return ModelSpec(
            family="mixtral",
            vocab_size=self.count("model.vocab") if self.given("model.vocab") else DEFAULT_VOCAB,
            hidden_size=hidden,
            num_layers=self.count("model.layers"),
            num_heads=heads,
            num_kv_heads=max(1, heads // self._heads_per_kv),
            head_dim=self._head_dim,
            num_experts=self.num_experts,
            top_k=self.top_ks[0],
            expert_size=width,
            norm_topk=True,
            max_positions=1 << 20,
            norm_eps=1e-6,
            rope=RopeSpec(),
            tie_embeddings=True,
        )

    @cached_property
    def _head_dim(self) -> int:
        hidden = self.count("model.hidden")
        if self.given("model.heads"):
            heads = self.count("model.heads")
            if hidden % heads:
                raise PlanError(f"model.hidden = {hidden} is no multiple of model.heads = {heads}.")
            return hidden // heads
        shards = self.count("layout.tp") if self.given("layout.tp") else 1
        return next((size for size in HEAD_DIMS if hidden % size == 0 and hidden // size >= shards), hidden)

    @cached_property
    def _heads_per_kv(self) -> int:
        if not self.given("model.kv_heads"):
            return 1
        heads, kv_heads = self.count("model.hidden") // self._head_dim, self.count("model.kv_heads")
        if heads % kv_heads:
            raise PlanError(f"model.kv_heads = {kv_heads} does not divide the {heads} attention heads.")
        return heads // kv_heads

    # -- hardware and layout ----------------------------------------------------------------------------------------

    @cached_property
    def dtype(self) -> str:
        if self.declared.model.dtype is None:
            raise UndeclaredError("model.dtype")
        return self.declared.model.dtype

    @property
    def value_bytes(self) -> float:
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def precision(self) -> Precision:
        return Precision(self.dtype, self.dtype, self.dtype, self.dtype)

    @cached_property
    def system(self) -> System:
        figures = self.declared.hardware
        return System(
            name="declared",
            source="the declared figures",
            peak_tflops={self.dtype: self.number("hardware.tflops")},
            memory_gb=self.number("hardware.memory_gb"),
            memory_gb_s=self.number("hardware.bandwidth_tb_s") * 1000,
            gpus_per_node=figures.most_gpus_per_node,
            intra_gb_s=figures.intra_gb_s,
            inter_gb_s=figures.inter_gb_s,
            efficiency=Efficiency(mfu=figures.mfu, bandwidth=figures.bandwidth_efficiency),
        )

    @cached_property
    def deployment(self) -> Deployment:
        standby = self.count("layout.standby_experts_per_gpu") if self.given("layout.standby_experts_per_gpu") else 0
        tp, pp, dp = (self.count(f"layout.{name}") for name in ("tp", "pp", "dp"))
        found = Deployment(tp, pp, dp, standby=standby)
        try:
            found.layout.check_model(self.count("model.layers"), self.as_declared.spec.num_heads)
        except ValueError as error:
            raise PlanError(f"layout cannot hold the model: {error}") from None
        return found

    @property
    def stage_layers(self) -> int:
        """Of the longest stage."""
        return max(map(len, stage_layers(self.count("model.layers"), self.deployment.pp)))

    @property
    def stage_experts(self) -> int:
        return self.stage_layers * self.num_experts

    def bounds(self, spec: ModelSpec) -> Bounds:
        return Bounds(spec, self.precision, self.system, self.deployment)

    @property
    def flops(self) -> float:
        """FLOP/s that one GPU reaches."""
        return self.bounds(self.working.spec).gpu_flops

    def held(self, spec: ModelSpec, batch: int, sequence: int) -> Footprint:
        """Of one GPU in serving, its caches full of so many sequences."""
        kv_tokens = batch * sequence / self.deployment.num_replicas
        return footprint(
            spec, self.precision, self.system, self.deployment, kv_tokens=kv_tokens, chunk_tokens=CHUNK_TOKENS
        )

    def kv_bytes(self, spec: ModelSpec, batch: int, sequence: int) -> float:
        """Of one GPU."""
        per_token = kv_gpu_token_bytes(spec, self.precision, self.deployment)
        return batch * sequence / self.deployment.num_replicas * per_token

    @property
    def batch(self) -> int:
        return self.count("workload.batch")

    @property
    def longest(self) -> int:
        return self.count("workload.max_sequence")

    @property
    def shortest(self) -> int:
        return self.count("workload.min_sequence") if self.given("workload.min_sequence") else self.longest


@dataclass(frozen=True)
class Check:
    """`field`: the figure that is judged, `section.name`. It is left out where neither that nor one of `also` is
    declared, unless what nobody says is just what is to be found (`speaks_up`)."""

    row: str
    field: str
    judge: Callable[[Facts], Judgement]
    also: tuple[str, ...] = ()
    speaks_up: bool = False
