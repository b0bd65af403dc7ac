"""A GPU without hardware: fake tensors on device "cuda", on every build of torch, and what the host does with them.

    with FakeCuda() as gpu:
        model = GPT(config, Mesh.single("cuda"))
        ...
        gpu.events.clear()
        engine.train_step(batches)
    print(gpu.events)

Everything that makes the host wait for the device is counted with the source line that causes it: values that are
read, synchronisations, and copies between pageable host memory and the device. Nothing is computed: a read returns a
plausible value. An operator whose inputs are on different devices raises.

A torch without CUDA needs tests.cuda.fake_device, imported before torch, for gradients.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as functional
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
COPIES = {"_to_copy", "copy_"}
VIEWS = {
    getattr(getattr(torch.ops.aten, name), overload)
    for overload, names in {
        "default": ("detach", "view", "_unsafe_view", "as_strided", "alias", "t", "permute", "expand", "unsqueeze"),
        "int": ("transpose", "select"),
        "Tensor": ("slice",),
    }.items()
    for name in names
}
GB = 1 << 30


def folder_of(package: str) -> Path:
    """Where a package is installed; does not import it: DeepSpeed prints as it is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package} is not installed")
    return Path(spec.origin).parent


PACKAGES = {name: folder_of(name) for name in ("neox", "deepspeed")}
FOLDERS = {name: f"{folder}/" for name, folder in PACKAGES.items()}


class Event(NamedTuple):
    """Something that the host does, and the innermost line of neox or DeepSpeed that causes it.

    Attributes:
        kind: "read", "synchronize", "pageable copy" or "pinned copy".
        site: "package/file.py:function".
        line: the line's number.
    """

    kind: str
    site: str
    line: int


class CudaTensors(FakeTensorMode):
    """Fake tensors that never start a GPU, whether or not torch reports one."""

    avoid_device_init = True

    def _cached_dispatch_impl(self, func, types, args, kwargs):
        """Views, which are most calls, come from device "meta": torch caches each shape and offset for itself."""
        if func in VIEWS and isinstance(args[0], FakeTensor) and args[0].constant is None:
            with in_kernel_invocation_manager(self):
                view = func(*args, **kwargs)
            return FakeTensor(self, view, args[0].fake_device)
        return super()._cached_dispatch_impl(func, types, args, kwargs)


class FakeCuda(TorchDispatchMode):
    """A context in which torch has one GPU, and its tensors are fake.

    Args:
        read: (tensor) -> the value that the host gets where it reads an element. By default flags (bool, uint8) are 0,
            numbers 1.

    Attributes:
        events: number of times that each event has happened; clear it to begin a count.
    """

    def __init__(self, read: Callable[[torch.Tensor], float] | None = None):
        super().__init__()
        self.events: Counter[Event] = Counter()
        self.read = plausible if read is None else read
        self.pinned: set[int] = set()
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> FakeCuda:
        tensors = CudaTensors(allow_non_fake_inputs=True)  # imports torch's compiler, so before torch is patched
        self.stack.enter_context(patched_torch(self))
        self.stack.enter_context(flash_attention())
        self.stack.enter_context(tensors)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.stack.close()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch's wrapper that would keep the compiler away is slow."""
        return False

    def note(self, kind: str) -> None:
        """Count an event at the line that is running."""
        self.events[Event(kind, *calling_line())] += 1

    def count(self, kind: str) -> int:
        """How many events of a kind there were."""
        return sum(number for event, number in self.events.items() if event.kind == kind)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in READS:
            return self.host_read(function, args, kwargs)
        if name in COPIES:
            self.note_copy(name, args, kwargs)
        return function(*args, **kwargs)

    def host_read(self, function, args, kwargs):
        """Answer a read, and count it if the tensor is on the device."""
        tensor = args[0]
        if tensor.device.type == "cuda":
            self.note("read")
        elif not isinstance(tensor, FakeTensor) or tensor.constant is not None:
            return function(*args, **kwargs)
        if function.overloadpacket.__name__ != "_local_scalar_dense":
            raise AssertionError(f"{function} makes the host wait for a result whose shape depends on data")
        return as_python(self.read(tensor), tensor.dtype)

    def note_copy(self, name: str, args, kwargs) -> None:
        """Count a copy between host and device."""
        if name == "copy_":
            source, target = args[1].device, args[0].device
            host = args[0] if target.type == "cpu" else args[1]
        else:
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
            host = args[0] if source.type == "cpu" else None
        if (source.type, target.type) == ("cuda", "cpu") and not kwargs.get("non_blocking"):
            self.note("read")
        elif {source.type, target.type} == {"cpu", "cuda"}:
            pinned = host is not None and storage_id(host) in self.pinned
            self.note("pinned copy" if pinned else "pageable copy")


def plausible(tensor: torch.Tensor) -> float:
    """What a read returns: no flag is raised, and every number is finite."""
    return 0 if tensor.dtype in (torch.bool, torch.uint8) else 1


def as_python(value: float, dtype: torch.dtype) -> bool | int | float:
    """The value as `item` returns it for a dtype."""
    if dtype == torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else int(value)


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of a tensor's memory."""
    return tensor.untyped_storage()._cdata


def calling_line() -> tuple[str, int]:
    """(site, line) of the innermost frame of neox or DeepSpeed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for package, folder in FOLDERS.items():
            if path.startswith(folder) and not path.endswith("/cuda_accelerator.py"):
                return f"{package}/{path.removeprefix(folder)}:{frame.f_code.co_name}", frame.f_lineno
        frame = frame.f_back
    return "elsewhere", 0


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Let scaled_dot_product_attention choose flash where a GPU does: a CPU build chooses the unfused formula."""
    choose = functional.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is not None or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > 256:
            return choose(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]

    with mock.patch.object(functional, "scaled_dot_product_attention", attention):
        yield


class FakeStream:
    """A stream; the host waits at `synchronize`."""

    gpu: FakeCuda
    device = torch.device("cuda", 0)
    stream_id = device_index = cuda_stream = 0

    def __init__(self, *_: object, **__: object):
        pass

    def synchronize(self) -> None:
        """Counted."""
        self.gpu.note("synchronize")

    def query(self) -> bool:
        """Does not wait."""
        return True

    def wait_stream(self, _: object) -> None:
        """The device waits, not the host."""

    wait_event = wait_stream

    def record_event(self, event: object = None) -> object:
        """An event."""
        return FakeEvent() if event is None else event

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FakeEvent(FakeStream):
    """An event; the host waits at `synchronize`."""

    def record(self, *_: object) -> None:
        """Nothing to record."""

    def wait(self, *_: object) -> None:
        """The device waits, not the host."""

    def elapsed_time(self, _: object) -> float:
        """Milliseconds."""
        return 1.0


@contextlib.contextmanager
def patched_torch(gpu: FakeCuda) -> Iterator[None]:
    """Replace the functions that call the driver, and the tensor methods that need a value or an address."""
    FakeStream.gpu = gpu
    stream = FakeStream()
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=80 * GB, major=9, minor=0, multi_processor_count=132
    )
    zero = lambda *_, **__: 0  # noqa: E731
    nothing = lambda *_, **__: None  # noqa: E731
    state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)  # noqa: E731
    values = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": zero,
        "set_device": nothing,
        "_lazy_init": nothing,
        "synchronize": lambda *_: gpu.note("synchronize"),
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_: True,
        "get_rng_state": state,
        "set_rng_state": nothing,
        "empty_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "mem_get_info": lambda *_: (79 * GB, 80 * GB),
        "memory_stats": lambda *_: {},
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), zero),
        "is_current_stream_capturing": lambda: False,
    }
    tensor_methods = {
        "pin_memory": lambda tensor, *_: gpu.pinned.add(storage_id(tensor)) or tensor,
        "is_pinned": lambda tensor, *_: storage_id(tensor) in gpu.pinned,
        "record_stream": nothing,
        "data_ptr": zero,
    }
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value, create=True))
        for name, value in tensor_methods.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, value))
        stack.enter_context(mock.patch.object(torch.cuda.nvtx, "range_push", nothing))
        stack.enter_context(mock.patch.object(torch.cuda.nvtx, "range_pop", nothing))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", converted))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda tensor: read_list(gpu, tensor)))
        yield


def converted(
    module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> torch.nn.Module:
    """`Module._apply` for fake parameters: sets their data, where torch would swap them, even those with hooks."""
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        tensor.data = function(tensor.data)
    return module


def read_list(gpu: FakeCuda, tensor: torch.Tensor) -> object:
    """`tolist`: one read for all elements."""
    if tensor.device.type == "cuda":
        gpu.note("read")
    element = as_python(gpu.read(tensor), tensor.dtype)
    return nested(element, list(tensor.shape))


def nested(element: object, shape: list[int]) -> object:
    """A nested list of a shape."""
    return [nested(element, shape[1:]) for _ in range(shape[0])] if shape else element
