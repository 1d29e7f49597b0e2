"""Random models, hardware, layouts and steps for the planner's properties."""

from dataclasses import replace

from hypothesis import strategies as st

from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.legal import divisors
from serve_app.plan.ops import Stage, Step
from serve_app.plan.system import Efficiency, System
from serve_app.plan.workload import Lengths, Workload
from tests.plan.cases import R10B


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    group, num_kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    num_experts = draw(st.sampled_from([1, 2, 3, 8, 16, 60, 128]))
    return replace(
        R10B,
        num_layers=draw(st.integers(1, 20)),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        hidden_size=draw(st.sampled_from([512, 2560])),
        expert_size=draw(st.sampled_from([768, 5120])),
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(8, num_experts))),
        shared_size=draw(st.none() | st.just(1024)),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def systems(draw: st.DrawFn) -> System:
    eff = Efficiency(
        mfu=draw(st.floats(0.1, 1)),
        attention_bandwidth=draw(st.sampled_from([None, 0.3])),
        layer_us=draw(st.sampled_from([0.0, 30.0])),
        step_us=draw(st.sampled_from([0.0, 300.0])),
        row_us=draw(st.sampled_from([0.0, 5.0])),
        expert_us=draw(st.sampled_from([0.0, 20.0])),
        kv_block=draw(st.sampled_from([0, 256])),
    )
    return System(
        name="random",
        source="a test",
        peak_tflops={"fp16": draw(st.floats(1, 2000))},
        memory_gb=draw(st.sampled_from([40.0, 64.0, 192.0])),
        memory_gb_s=draw(st.floats(50, 8000)),
        gpus_per_node=draw(st.sampled_from([1, 2, 8])),
        intra_gb_s=draw(st.sampled_from([12.0, 450.0])),
        inter_gb_s=draw(st.sampled_from([1.0, 50.0])),
        contention=draw(st.sampled_from([{}, {2: 1.3, 4: 2.0}])),
        efficiency=eff,
    )


@st.composite
def deployments(draw: st.DrawFn, spec: ModelSpec, system: System, *, most: int = 8) -> Deployment:
    """One that is legal."""
    tp = draw(st.sampled_from([tp for tp in divisors(system.gpus_per_node) if tp <= spec.num_heads]))
    pp = draw(st.integers(1, spec.num_layers))
    return Deployment(tp, pp, draw(st.integers(1, most)), draw(st.integers(1, most)))


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    spec, system = draw(specs()), draw(systems())
    deployment = draw(deployments(spec, system))
    precision = Precision("fp16", draw(st.sampled_from(["fp16", "fp8", "int4"])), "fp16", "fp16")
    index = draw(st.integers(0, deployment.pp - 1))
    return Stage(spec, precision, system, deployment, index, draw(st.booleans()))


prompts = st.builds(Step.prompt, st.floats(1, 20_000), st.floats(0, 50_000), sampled=st.sampled_from([0.0, 0.5, 1.0]))
answers = st.builds(Step.decode, st.floats(0.01, 1000), st.floats(1, 100_000))
steps = prompts | answers | st.builds(Step.__add__, prompts, answers)

lengths = st.builds(Lengths.fixed, st.integers(1, 30_000)) | st.builds(
    lambda least, more: Lengths.uniform(least, least + more), st.integers(1, 5000), st.integers(0, 20_000)
)
workloads = st.builds(
    Workload,
    lengths,
    st.builds(Lengths.fixed, st.integers(1, 3000)),
    st.integers(1, 2000),
    prefix_share=st.sampled_from([0.0, 0.3, 0.9]),
    burstiness=st.sampled_from([0.5, 1.0, 3.0]),
    chunk_tokens=st.sampled_from([256, 8192]),
)
