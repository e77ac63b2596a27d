"""Code that says cuda runs on a CPU, and torch itself is told the truth."""

import contextlib
import io
import types

import pytest
import torch
from torch.utils.data import DataLoader

from mindspeed.errors import PlatformError
from tests.platform._activated import cpu_activated

pytestmark = pytest.mark.usefixtures("cpu")

DEVICES = ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 2), 0, 3, torch.device("cpu"), "cpu"]


@pytest.mark.parametrize("device", DEVICES, ids=repr)
def test_every_way_to_name_a_device(device):
    x = torch.zeros(2, 3, device=device)
    for tensor in (
        x,
        torch.tensor([1.0], device=device),
        torch.as_tensor([1.0], device=device),
        torch.arange(3, device=device),
        torch.randn(3, device=device),
        torch.randint(0, 4, (3,), device=device),
        torch.full((2,), 1.0, device=device),
        torch.empty_like(x, device=device),
        torch.empty_strided((2,), (1,), device=device),
        x.new_zeros(3, device=device),
        x.new_tensor([1.0], device=device),
        x.to(device),
        x.to(device=device, dtype=torch.float64),
        x.cuda(device) if not str(device).startswith("cpu") else x.cuda(),
    ):
        assert tensor.device.type == "cpu"
    assert x.to(device, torch.float64).dtype is torch.float64
    assert torch.nn.Linear(2, 2, device=device).to(device).weight.device.type == "cpu"
    assert torch.nn.Linear(2, 2, device="meta").to_empty(device=device).weight.device.type == "cpu"
    assert torch.rand(2, generator=torch.Generator(device=device)).shape == (2,)


def test_cuda_methods_return_the_thing_itself():
    x, linear = torch.zeros(2, 3, 4, 5), torch.nn.Linear(2, 2)
    assert x.cuda() is x and x.cuda(0, non_blocking=True) is x and x.pin_memory() is x and linear.cuda() is linear
    assert x.cuda(memory_format=torch.channels_last).is_contiguous(memory_format=torch.channels_last)
    assert not x.is_cuda and not x.is_pinned()
    assert torch.empty(2, pin_memory=True).shape == (2,)
    assert isinstance(torch.default_generator, torch.Generator) and issubclass(type(torch.default_generator), torch.Generator)


def test_other_devices_stay_what_they_are():
    assert torch.zeros(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    with torch.device("cuda"):
        assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    torch.set_default_device("cuda")
    assert torch.get_default_device() == torch.device("cpu") == torch.zeros(2).device
    torch.set_default_device(None)
    assert torch.zeros(2).to(torch.zeros(1, dtype=torch.float64)).dtype is torch.float64
    with pytest.raises(RuntimeError):
        torch.zeros(2, device="no_such_device")


def test_truth_is_told():
    assert not torch.cuda.is_available() and not torch.cuda.is_initialized()
    assert torch.cuda.device_count() == 1
    as_torch = types.ModuleType("torch.somewhere")
    exec("import torch\ndef count(): return torch.cuda.device_count()", as_torch.__dict__)
    assert as_torch.count() == 0
    exec("def make(): return torch.zeros(1, device='cuda')", as_torch.__dict__)
    with pytest.raises((AssertionError, RuntimeError)):
        as_torch.make()


def test_questions_about_the_device():
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.cuda.get_device_capability() >= (8, 0) and torch.cuda.get_device_properties(0).major == 8
    assert torch.cuda.get_device_properties("cuda:0").total_memory > 2**28
    assert torch.cuda.get_device_name() == "cpu" and torch.cuda.is_bf16_supported()
    for call in (torch.cuda.synchronize, torch.cuda.empty_cache, torch.cuda.ipc_collect, torch.cuda.init):
        assert call() is None
    torch.cuda.set_device(7)
    assert torch.cuda.utilization() == torch.cuda.temperature() == torch.cuda.power_draw() == torch.cuda.clock_rate() == 0
    with torch.cuda.device(0), torch.cuda.nvtx.range("step"):
        torch.cuda.nvtx.range_push("a")
        torch.cuda.nvtx.range_pop()


def test_streams_are_program_order():
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream == torch.cuda.default_stream()
    stream.wait_stream(torch.cuda.current_stream())
    event.record(stream)
    stream.wait_event(event)
    later = stream.record_event()
    later.synchronize()
    assert later.query() and event.elapsed_time(later) >= 0
    torch.zeros(2).record_stream(stream)
    with torch.cuda.stream(None):
        torch.cuda.set_stream(stream)
    assert isinstance(stream, torch.cuda.Stream) and isinstance(event, torch.cuda.Event)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch.cuda.CUDAGraph(), "torch.cuda.CUDAGraph needs a CUDA device .*; remove --enable-cuda-graph"),
        (lambda: torch.cuda.graph(None), "torch.cuda.graph needs a CUDA device"),
        (lambda: torch.cuda.graph_pool_handle(), "graph_pool_handle needs"),
        (lambda: torch.cuda.make_graphed_callables(None, ()), "make_graphed_callables needs"),
        (lambda: torch.cuda.cudart(), "cudart needs .*; remove --profile without --use-pytorch-profiler"),
        (lambda: torch.cuda.memory._record_memory_history(), "remove --record-memory-history"),
        (lambda: torch.cuda.memory._snapshot(), "remove --record-memory-history"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(call, message):
    with pytest.raises(PlatformError, match=message):
        call()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mixed_precision():
    linear, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert linear(x).dtype is torch.bfloat16 and torch.is_autocast_enabled()
        assert torch.get_autocast_gpu_dtype() is torch.get_autocast_dtype("cuda") is torch.bfloat16
    with torch.cuda.amp.autocast(dtype=torch.bfloat16):
        assert linear(x).dtype is torch.bfloat16
    assert linear(x).dtype is torch.float32 and not torch.is_autocast_enabled()
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    assert scaler.is_enabled() and scaler.scale(torch.ones(1)).item() == 4.0
    assert torch.cuda.amp.GradScaler().is_enabled() and torch.amp.GradScaler().is_enabled()


def test_autograd_functions_with_mixed_precision():
    class Twice(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
        def forward(ctx, x):
            assert x.dtype is torch.float32
            return 2 * x

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx, gradient):
            return 2 * gradient

    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        Twice.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2]


def test_recompute_keeps_mixed_precision():
    """torch.utils.checkpoint restores autocast of "cuda" and of the CPU one after the other; only the latter is ours."""
    linear, x = torch.nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    seen = []

    def body(x):
        seen.append(linear(x).dtype)
        return linear(x).sum()

    with torch.autocast("cuda", dtype=torch.bfloat16):
        torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False).backward()
        torch.utils.checkpoint.checkpoint(body, x, use_reentrant=True).backward()
    assert seen == [torch.bfloat16] * 4


def test_files_from_a_gpu_are_read(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"weight": torch.arange(4.0)}, path)
    as_if_from_gpu = io.BytesIO()
    with _tagged("cuda:0"):
        torch.save({"weight": torch.arange(4.0)}, as_if_from_gpu)
    for where in (None, "cuda", "cuda:3", "cpu", torch.device("cuda"), {"cuda:0": "cuda:1"}, {}, lambda storage, tag: None):
        for file in (path, as_if_from_gpu):
            if file is as_if_from_gpu:
                file.seek(0)
            loaded = torch.load(file, map_location=where)["weight"]
            assert loaded.device.type == "cpu" and loaded.tolist() == [0, 1, 2, 3]
    assert torch.load(path, map_location="meta")["weight"].device.type == "meta"


@contextlib.contextmanager
def _tagged(tag):
    """Let torch.save believe that CPU storages live on a GPU."""
    from torch import serialization

    serialization.register_package(1, lambda storage: tag, lambda storage, where: None)
    try:
        yield
    finally:
        serialization._package_registry.pop(0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_is_alive(backend):
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    assert compiled(torch.ones(3)).tolist() == [2, 2, 2]
    names_cuda = torch.compile(lambda x: x + torch.ones(3, device="cuda").to(torch.cuda.current_device()), backend=backend)
    assert names_cuda(torch.ones(3)).tolist() == [2, 2, 2]
    torch._dynamo.reset()


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((2,), float(index**2), device="cuda")


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers):
    """Forked workers inherit the platform; pinning is dropped without a warning."""
    batches = list(DataLoader(Squares(), batch_size=4, num_workers=workers, pin_memory=True, timeout=60 if workers else 0))
    assert torch.cat(batches)[:, 0].tolist() == [index**2 for index in range(8)] and not torch.cuda.is_available()


def in_child(is_active, results):
    if not is_active:  # a spawned process starts from nothing, as a new rank does
        from mindspeed.patching.ledger import Ledger
        from mindspeed.platform import current

        assert torch.cuda.device_count() == 0
        current().activate(Ledger())
    x = torch.arange(3.0, device="cuda").cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        results.put((torch.cuda.device_count(), x.tolist(), torch.cuda.is_available()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(method):
    context = torch.multiprocessing.get_context(method)
    results = context.SimpleQueue()
    child = context.Process(target=in_child, args=(method == "fork", results))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and results.get() == (1, [0, 1, 2], False)


def test_wrapped_functions_look_like_torchs_own():
    import inspect

    assert torch.zeros.__name__ == "zeros" and "filled with the scalar value" in torch.zeros.__doc__
    assert callable(torch.zeros.__wrapped__) and "map_location" in inspect.signature(torch.load).parameters
    assert torch.distributed.all_reduce.__name__ == "all_reduce"
    assert "async_op" in inspect.signature(torch.distributed.all_reduce).parameters


def test_the_users_own_devices_can_be_left_alone(monkeypatch):
    monkeypatch.setenv("MINDSPEED_SHIM", "host-only")
    host, user = types.ModuleType("megatron.somewhere"), types.ModuleType("train_my_model")
    code = (
        "import torch\n"
        "def make(): return torch.zeros(1, device='cuda')\n"
        "def move(): return torch.zeros(1).to('cuda')\n"
        "def layer(): return torch.nn.Linear(2, 2, device='cuda').weight"
    )
    exec(code, host.__dict__)
    exec(code, user.__dict__)
    with cpu_activated():
        assert all(call().device.type == "cpu" for call in (host.make, host.move, host.layer))
        for call in (user.make, user.move):
            with pytest.raises((AssertionError, RuntimeError)):
                call()
    monkeypatch.setenv("MINDSPEED_SHIM", "none")
    with pytest.raises(PlatformError, match="MINDSPEED_SHIM=none: must be all or host-only. Unset it"), cpu_activated():
        pass
