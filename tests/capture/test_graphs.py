"""Models compiled by torch.compile log what eager ones do, and their graphs are whole."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig

from bhlog.capture.contract.errors import UnsupportedModel
from bhlog.capture.graphs import Graph
from bhlog.capture.observe import observe, route
from tests.capture.tiny import EOS, LAYERS, PAD, batch, no_static_cache, tiny_model
from tests.synthetic import normal_kde

KDE = normal_kde(range(LAYERS))
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
KINDS = ["observe", "route", "empirical"]
WHOLE_GRAPHS = [  # each kind by each backend; compiled elsewhere, the code of a kind is the same
    *(("before", kind, "aot_eager") for kind in KINDS),
    *(pytest.param("before", kind, "inductor", marks=pytest.mark.slow) for kind in KINDS),
    *(
        (made, kind, "aot_eager")
        for made in ("inside", "observed", "in place")
        for kind in KINDS[:2]
    ),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def tables(run: Path) -> list[Any]:
    """Both tables of a run, without what tells forwards apart."""
    return [pq.read_table(sorted((run / folder).iterdir())[0]) for folder in ("routing", "tokens")]


def how(kind: str, model: Any, run: Path) -> Any:
    if kind == "observe":
        return observe(model, run)
    if kind == "empirical":
        return route(model, run, alpha=0.4, p_values="empirical", max_k=4)
    return route(model, run, alpha=0.3, kde=KDE, max_k=4)


def same(found: Path, expected: Path, *, exactly: bool = True) -> None:
    for ours, theirs in zip(tables(found), tables(expected), strict=True):
        assert ours.num_rows == theirs.num_rows > 0
        for name in theirs.column_names:
            if exactly or name not in ("logits", "weights", "nll", "experts", "n_rejected"):
                assert ours[name].equals(theirs[name]), name


@pytest.mark.parametrize(("made", "kind", "backend"), WHOLE_GRAPHS)
def test_a_whole_graph_logs_what_eager_code_does(tmp_path, kind, backend, made):
    model, (ids, mask) = tiny_model(), batch([9, 4, 6], left=True)
    with how(kind, model, tmp_path / "eager"):
        expected = [model(ids, attention_mask=mask).logits for _ in range(3)][-1]
    counters.clear()
    options = {"backend": backend, "fullgraph": True}
    compiled = torch.compile(model, **options)
    if made == "before":
        compiled(ids, attention_mask=mask)
    if made == "in place":
        model.compile(**options)
        compiled = model
    with how(kind, compiled if made == "observed" else model, tmp_path / "graph"):
        if made == "inside":
            compiled = torch.compile(model, **options)
        found = [compiled(ids, attention_mask=mask).logits for _ in range(3)][-1]
    exactly = backend != "inductor"
    torch.testing.assert_close(
        found, expected, rtol=0 if exactly else 1e-4, atol=0 if exactly else 1e-4
    )
    same(tmp_path / "graph", tmp_path / "eager", exactly=exactly)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == (2 if made == "before" else 1)


@pytest.mark.slow
def test_after_the_block_a_compiled_model_is_plain(tmp_path):
    model, (ids, mask) = tiny_model(), batch([5, 5])
    compiled = torch.compile(model, backend="aot_eager")
    before = compiled(ids, attention_mask=mask).logits
    with route(model, alpha=0.3, kde=KDE, max_k=4):
        during = compiled(ids, attention_mask=mask).logits
    assert not torch.equal(before, during)
    assert torch.equal(before, compiled(ids, attention_mask=mask).logits)


@pytest.mark.slow
def test_batches_that_change_and_prefills_between_decoded_tokens(tmp_path):
    model = tiny_model()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    shapes = ([5], [3, 7], [8, 2, 4], [6, 6])
    for run, called in (("eager", model), ("graph", compiled)):
        with observe(model, tmp_path / run):
            for lengths in shapes:
                ids, mask = batch(lengths)
                called(ids, attention_mask=mask)
                model(ids, attention_mask=mask)  # eager code between
    same(tmp_path / "graph", tmp_path / "eager")


@no_static_cache
@pytest.mark.parametrize("kind", ["observe", "route"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_with_a_static_cache_is_compiled_and_logged(tmp_path, kind, backend):
    model, (ids, mask) = tiny_model(), batch([5, 3], left=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    with how(kind, model, tmp_path / "eager"):
        expected = model.generate(ids, attention_mask=mask, cache_implementation="static",
                                  disable_compile=True, **settings)  # fmt: skip
    compile_config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    config = GenerationConfig(
        cache_implementation="static", compile_config=compile_config, **settings
    )
    counters.clear()
    with how(kind, model, tmp_path / "graph"):
        found = model.generate(ids, attention_mask=mask, generation_config=config)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert found.tolist() == expected.tolist()
    same(tmp_path / "graph", tmp_path / "eager", exactly=backend != "inductor")


def test_two_compiled_models_are_observed_at_once(tmp_path):
    models, (ids, mask) = [tiny_model(seed) for seed in (0, 1)], batch([5, 2])
    for i, model in enumerate(models):
        with observe(model, tmp_path / f"eager{i}"):
            model(ids, attention_mask=mask), model(ids, attention_mask=mask)
    compiled = [torch.compile(model, backend="aot_eager", fullgraph=True) for model in models]
    with observe(models[0], tmp_path / "graph0"), observe(models[1], tmp_path / "graph1"):
        for called in (*compiled, *reversed(compiled)):
            called(ids, attention_mask=mask)
    for i in range(2):
        same(tmp_path / f"graph{i}", tmp_path / f"eager{i}")


def test_layers_compiled_one_by_one_log_the_same(tmp_path):
    model, (ids, mask) = tiny_model(), batch([5, 2])
    with observe(model, tmp_path / "eager"):
        model(ids, attention_mask=mask)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with observe(model, tmp_path / "graph"):
        model(ids, attention_mask=mask)
    same(tmp_path / "graph", tmp_path / "eager")


def test_a_compiled_function_that_calls_the_model_logs_the_same(tmp_path):
    model, (ids, mask) = tiny_model(), batch([5, 2])
    with observe(model, tmp_path / "eager"):
        model(ids, attention_mask=mask)

    @torch.compile(backend="aot_eager")
    def step(ids, mask):
        return model(ids, attention_mask=mask).logits.argmax(-1)

    with observe(model, tmp_path / "graph"):
        step(ids, mask)
    same(tmp_path / "graph", tmp_path / "eager")


def test_a_base_model_that_is_compiled_alone_logs_the_same(tmp_path):
    model, (ids, mask) = tiny_model(), batch([5, 2])
    with observe(model, tmp_path / "eager"):
        model(ids, attention_mask=mask)
    model.model.compile(backend="aot_eager", fullgraph=True)
    with observe(model, tmp_path / "graph"):
        model(ids, attention_mask=mask)
    same(tmp_path / "graph", tmp_path / "eager")


def test_what_is_paused_leaves_no_row_and_breaks_no_graph(tmp_path):
    model, (ids, mask) = tiny_model(), batch([5])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with observe(model, tmp_path / "run") as patcher:
        with patcher.paused():
            compiled(ids, attention_mask=mask)
        compiled(ids, attention_mask=mask)
    assert tables(tmp_path / "run")[1].num_rows == 5


def test_a_compiled_forward_that_fails_leaves_no_row(tmp_path):
    model, (ids, mask) = tiny_model(), batch([5])
    compiled = torch.compile(model, backend="aot_eager")
    with observe(model, tmp_path / "run"):
        with pytest.raises(Exception, match=r"index|range"):
            compiled(ids + 1000, attention_mask=mask)
        compiled(ids, attention_mask=mask)
    assert tables(tmp_path / "run")[1].num_rows == 5


def test_two_threads_in_one_compiled_model_end_in_one_line():
    graph, module = Graph(), torch.nn.Identity()
    graph.begin(module, None, recorded=True)
    thread = ThreadPoolExecutor(1).submit(graph.begin, module, None, recorded=True)
    with pytest.raises(UnsupportedModel, match="two threads run a compiled model at once"):
        thread.result()
    graph.end()
    graph.begin(module, None, recorded=True)


def test_a_graph_of_a_part_cannot_be_whole_and_says_so(tmp_path):
    model, (ids, mask) = tiny_model(), batch([5])
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    with (
        pytest.raises(UnsupportedModel, match="compile the model itself") as error,
        observe(model, tmp_path / "run"),
    ):
        model(ids, attention_mask=mask)
    assert "\n" not in str(error.value)


def test_a_hook_that_changes_what_was_decided_is_found_in_a_graph_too(tmp_path):
    model, (ids, mask) = tiny_model(), batch([5])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with (
        pytest.raises(UnsupportedModel, match="changes what routing by BH has decided"),
        route(model, tmp_path / "run", alpha=0.3, kde=KDE, max_k=4),
    ):
        gate = model.model.layers[1].mlp.gate
        gate.register_forward_hook(lambda module, args, out: (out[0], out[1], 0 * out[2]))
        compiled(ids, attention_mask=mask)
