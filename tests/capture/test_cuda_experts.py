"""The experts of used pairs in Triton, and a routed model's cost, which only a GPU shows."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from bhlog.capture.changes import Changes
from bhlog.capture.kernels.loading import experts_kernel
from bhlog.capture.observe import route
from bhlog.capture.routers.expert_code import take
from bhlog.capture.routers.search import find_routers
from tests.capture.pairs import make_case, slow_experts
from tests.synthetic import normal_kde

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(case: tuple[Tensor, ...], **options: Any) -> Tensor:
    kernel = experts_kernel()
    assert kernel is not None
    return kernel(*case, **{"most_pairs": 1 << 20, **options})


def distance(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference beside the norm."""
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def on_gpu(case: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to("cuda", dtype) if t.is_floating_point() else t.cuda() for t in case)


# bfloat16 keeps 8 bits: the inputs are given in it, two roundings of at most 2^-9 each follow
BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 1e-5}


@pytest.mark.parametrize(
    ("dtype", "T"),
    [(torch.bfloat16, T) for T in (1, 3, 64, 700, 5000)]
    + [(torch.float16, 64), (torch.float16, 5000), (torch.float32, 64), (torch.float32, 700)],
)
@pytest.mark.parametrize("E", [4, 60, 512])
def test_the_kernel_is_a_float32_loop_over_experts(dtype, T, E):
    for K, H, inner in ((1, 200, 72), (min(E, 16), 256, 128)):
        case = on_gpu(make_case(T, E, K, H, inner), dtype)
        truth = slow_experts(*(t.double() if t.is_floating_point() else t for t in case))
        found = run(case)
        assert distance(found, truth) < BOUNDS[dtype]
        assert torch.equal(run(case), found)
        assert distance(run(case, most_pairs=K * (T // 3 + 1)), truth) < BOUNDS[dtype]


def test_the_kernel_knows_gelu():
    case = on_gpu(make_case(300, 8, 4, 64, 48), torch.bfloat16)
    truth = slow_experts(
        *(t.double() if t.is_floating_point() else t for t in case),
        act=lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
    )
    assert distance(run(case, gelu=True), truth) < BOUNDS[torch.bfloat16]


def test_the_kernel_takes_a_batch_of_nothing():
    x, experts, weights, *matrices = on_gpu(make_case(5, 8, 2, 32, 16), torch.bfloat16)
    assert run((x[:0], experts[:0], weights[:0], *matrices)).shape == (0, 32)
    assert not run((x, experts[:, :0], weights[:, :0], *matrices)).any()
    assert not run((x, torch.full_like(experts, 8), weights, *matrices)).any()


@pytest.mark.parametrize("T", [1, 8, 300, 2000])
@torch.inference_mode()
def test_a_graph_holds_the_kernel_and_reads_the_counts_when_it_runs(T):
    x, experts, weights, *matrices = on_gpu(make_case(T, 64, 8, 256, 128), torch.bfloat16)
    run((x, experts, weights, *matrices))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run((x, experts, weights, *matrices))
    for seed in range(3):
        other = on_gpu(make_case(T, 64, 8, 256, 128, seed=seed), torch.bfloat16)
        for mine, new in zip((x, experts, weights), other, strict=False):
            mine.copy_(new)
        graph.replay()
        assert torch.equal(found, run((x, experts, weights, *matrices)))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=500,
        eos_token_id=None,
    )
    model = OlmoeForCausalLM(config).eval().to("cuda", torch.bfloat16)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.1)
    return model


@torch.inference_mode()
def test_native_choices_give_what_grouped_mm_gives(model):
    """Both round to bfloat16; theirs twice more (the gate, each weighted row)."""
    router = find_routers(model)[0]
    hidden = torch.randn(400, 256, device="cuda", dtype=torch.bfloat16)
    _, weights, experts = router.module(hidden)
    theirs = router.experts(hidden, experts, weights)
    changes = Changes()
    take(router, changes)
    ours = router.experts(hidden, experts, weights)
    changes.undo()
    assert distance(ours, theirs.double()) < 8e-3
    assert torch.equal(router.experts(hidden, experts, weights), theirs)


def test_gradients_of_a_routed_model_are_those_of_its_own_routing(model):
    ids = torch.randint(0, 500, (2, 40), device="cuda")
    parameters = [
        model.model.layers[0].mlp.gate.weight,
        *model.model.layers[0].mlp.experts.parameters(),
    ]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.double().clone() for p in parameters]

    own = gradients()
    with route(model, alpha=0.3, kde=normal_kde(range(2)), min_k=8, max_k=8):
        routed = gradients()
    for mine, theirs in zip(routed, own, strict=True):
        assert distance(mine, theirs) < 0.03  # bfloat16 through two layers and back
    model.zero_grad()


@torch.inference_mode()
def test_a_compiled_model_is_routed_as_the_bare_one(model):
    ids = torch.randint(0, 500, (2, 40), device="cuda")
    with route(model, alpha=0.3, kde=normal_kde(range(2)), max_k=8):
        expected = model(ids).logits
        found = torch.compile(model, backend="aot_eager")(ids).logits
    assert distance(found, expected.double()) < 0.03
