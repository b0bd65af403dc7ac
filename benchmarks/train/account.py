"""Counts what a GPU does in a part of a program that runs on fake tensors: kernels, bytes, FLOPs, peak memory.

    with FakeCuda(), Account() as account:
        ...
    print(account.total("launches"))

The rules, the same for every model:
- An operator of torch counts as one kernel that reads each input once and writes each output once. That is a lower
  bound: a matrix product with split k, or the gradient of an embedding, takes several. Views and allocations launch
  nothing.
- Operators over lists of tensors (`_foreach_*`, `_fused_adamw_`) count as many kernels as torch's multi_tensor_apply
  launches.
- Operators of neox count the kernels that their CUDA launchers start, and the bytes that their headers in csrc/ops
  state. The emulator's tests compare these bytes with what the kernels move.
- Attention counts the pairs of queries and keys that the causal mask and the window leave visible. Document boundaries
  depend on values, which fake tensors lack, so each sequence counts as one document.
- Collectives count nothing, because a link bounds them and not the memory of the device.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Operators that launch nothing, although they are not views.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
    "_local_scalar_dense", "device", "_fused_sdp_choice", "record_stream", "is_pinned", "resize_", "set_",
}  # fmt: skip
# Operators that do not read what they overwrite.
WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "_foreach_zero_"}
# Operator -> an argument of which it reads only as many elements as its output has.
LOOKUPS = {"embedding": "weight", "gather": "self", "index": "self", "index_select": "self"}
# Operator -> an argument of which it reads no element, or a negligible number.
UNREAD = dict.fromkeys(
    (
        *("nll_loss_forward", "nll_loss_backward"),
        *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"),
    ),
    "self",
)
UNWRITTEN = {"_fused_adamw_": "grads"}  # written only with a loss scale, which no call here has
# Limits of ATen/native/cuda/MultiTensorApply.cuh.
CHUNK, MAX_BLOCKS = 65536, 320  # elements of a block, blocks of a launch
MAX_TENSORS = (110, 64, 48, 36, 30)  # tensors of a launch, by the number of lists


@dataclass
class Cost:
    """Cost of one call of an operator.

    Attributes:
        launches: kernels and memory fills.
        read: bytes.
        written: bytes.
        flops: floating-point operations of matrix products and attention.
        scratch: bytes that the operator allocates and frees.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    flops: float = 0.0
    scratch: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class Row:
    """One call of an operator.

    Attributes:
        phase: the account's phase at the call.
        name: the operator, such as aten.mm.
        shape: of its first tensor.
        cost: of the call.
    """

    phase: str
    name: str
    shape: tuple[int, ...]
    cost: Cost


class Account(TorchDispatchMode):
    """Records every operator on CUDA tensors. Enter it inside a FakeCuda.

    Attributes:
        rows: the calls so far.
        phase: name of the part of the program that runs; set it as the program proceeds.
        memory: bytes allocated, now and at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.phase = ""
        self.memory = Memory()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        produced = on_device(out)
        self.memory.add(produced)
        inputs = on_device((args, kwargs))
        if inputs or produced:
            cost = cost_of(function, args, kwargs, out)
            if cost.launches:
                self.memory.borrow(cost.scratch)
                name, first = f"{function.namespace}.{name_of(function)}", (inputs or produced)[0]
                self.rows.append(Row(self.phase_of_call(), name, tuple(first.shape), cost))
        return out

    def phase_of_call(self) -> str:
        """The phase of the operator that just ran; subclasses may derive it from the stack."""
        return self.phase

    def start(self) -> None:
        """Forget the rows and the peak. Allocated memory still counts."""
        self.rows.clear()
        self.memory.peak = self.memory.now

    def total(self, what: str, phase: str | None = None) -> float:
        """Sum of a field of Cost over the rows, or over those of a phase."""
        return sum(getattr(row.cost, what) for row in self.rows if phase in (None, row.phase))

    def by_name(self) -> dict[tuple[str, str], Cost]:
        """Costs summed by phase and operator."""
        sums: dict[tuple[str, str], Cost] = defaultdict(Cost)
        for row in self.rows:
            into = sums[row.phase, row.name]
            into.launches += row.cost.launches
            into.read += row.cost.read
            into.written += row.cost.written
            into.flops += row.cost.flops
        return dict(sums)

    def largest(self, count: int) -> list[tuple[str, str, Cost]]:
        """(phase, operator, cost) of those that move the most bytes."""
        ranked = sorted(self.by_name().items(), key=lambda item: -item[1].moved)
        return [(phase, name, cost) for (phase, name), cost in ranked[:count]]

    def roofline(self, flops: float, bandwidth: float) -> float:
        """Seconds if every operator takes the time of its FLOPs or of its bytes, whichever is longer."""
        return sum(max(row.cost.flops / flops, row.cost.moved / bandwidth) for row in self.rows)


class Memory:
    """Bytes allocated on the device: now, and at the peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.live: set[int] = set()

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count storages that are not counted yet, until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self.live:
                continue
            self.live.add(storage._cdata)
            size = storage.nbytes()
            self.now += size
            weakref.finalize(storage, self.free, storage._cdata, size)
        self.peak = max(self.peak, self.now)

    def free(self, key: int, size: int) -> None:
        """Stop counting a storage that was freed."""
        self.live.discard(key)
        self.now -= size

    def borrow(self, size: int) -> None:
        """Include memory that an operator allocates and frees in the peak."""
        self.peak = max(self.peak, self.now + size)


def name_of(function: torch._ops.OpOverload) -> str:
    """The operator's name without namespace and overload."""
    return function.overloadpacket.__name__


def on_device(tree: object) -> list[torch.Tensor]:
    """The CUDA tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"]


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded dimension count once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride or not size) * tensor.element_size()


def distinct(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors without repetitions of the same memory."""
    return list({(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors}.values())


def bytes_of(tree: object) -> int:
    """Bytes of the distinct CUDA tensors among arguments or results."""
    return sum(size_of(tensor) for tensor in distinct(on_device(tree)))


def is_view(function: torch._ops.OpOverload) -> bool:
    """Whether the results alias the arguments and nothing is written."""
    schema = function._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


def arguments_of(function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call by their names in the schema; the defaults of those that it leaves out."""
    parameters = function._schema.arguments
    given = dict(zip((parameter.name for parameter in parameters), args, strict=False)) | kwargs
    return {parameter.name: given.get(parameter.name, parameter.default_value) for parameter in parameters}


def cost_of(function: torch._ops.OpOverload, args: tuple, kwargs: dict, out: object) -> Cost:
    """The cost of one call."""
    name, arguments = name_of(function), arguments_of(function, args, kwargs)
    if function.namespace == "neox":
        return NEOX[name](arguments, out) if name in NEOX else default_cost(function, arguments, out)
    if name in FREE or function.namespace == "c10d" or is_view(function):
        return Cost()
    if name in SDPA:
        return SDPA[name](arguments, out)
    cost = default_cost(function, arguments, out)
    if name.startswith(("_foreach", "_fused")):
        cost.launches = multi_tensor_launches([value for value in args if isinstance(value, (list, tuple))])
    packet = function.overloadpacket
    if packet in flop_registry:
        cost.flops = flop_registry[packet](*args, **kwargs, out_val=out)
    return cost


def default_cost(function: torch._ops.OpOverload, arguments: dict, out: object) -> Cost:
    """The cost of one kernel that reads every input and writes every output once."""
    name = name_of(function)
    read, written = [], []
    for parameter in function._schema.arguments:
        value = arguments[parameter.name]
        writes = parameter.alias_info is not None and parameter.alias_info.is_write
        writes = writes and UNWRITTEN.get(name) != parameter.name
        if writes:
            written.append(value)
        unread = parameter.is_out or parameter.name in (UNREAD.get(name), LOOKUPS.get(name))
        if not unread and not (writes and name in WRITE_ONLY):
            read.append(value)
    looked_up = bytes_of(out) if name in LOOKUPS else 0
    return Cost(1, bytes_of(read) + looked_up, bytes_of(written or out))


def multi_tensor_launches(lists: Sequence[Sequence[torch.Tensor]]) -> int:
    """Kernels that multi_tensor_apply launches: a launch is full at MAX_BLOCKS chunks, or at its number of tensors."""
    if not lists or not lists[0]:
        return 0
    launches = tensors = blocks = 0
    max_tensors = MAX_TENSORS[min(sum(map(bool, lists)), len(MAX_TENSORS)) - 1]
    for tensor in lists[0]:
        if tensor.numel() == 0:
            continue
        tensors += 1
        chunks = -(-tensor.numel() // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            if blocks == MAX_BLOCKS or (tensors == max_tensors and chunk == chunks - 1):
                launches, blocks = launches + 1, 0
                tensors = 0 if chunk == chunks - 1 else 1
    return launches + (blocks > 0)


def attention_pairs(s: int, t: int, causal: bool, window: int = 0) -> int:
    """Visible pairs of a query and a key per head. The last query is at the last key; a window of 0 is none."""
    if not causal:
        return s * t
    return sum(min(position + 1, window or t) for position in range(max(t - s, 0), t))


def sdpa(arguments: dict, out: object) -> Cost:
    """Forward of torch's fused attention: query [b, n, s, d], key and value."""
    b, n, s, d = arguments["query"].shape
    pairs = attention_pairs(s, arguments["key"].shape[2], arguments["is_causal"])
    written = [leaf for leaf in on_device(out) if leaf.dtype.is_floating_point]
    return Cost(1, bytes_of(arguments), bytes_of(written), 4 * b * n * pairs * d)


def sdpa_backward(arguments: dict, out: object) -> Cost:
    """Backward of torch's fused attention, which reads its output and lse too: three kernels, dq summed in fp32."""
    b, n, s, d = arguments["query"].shape
    pairs = attention_pairs(s, arguments["key"].shape[2], arguments["is_causal"])
    read = [leaf for leaf in on_device(arguments) if leaf.dtype.is_floating_point]
    return with_fp32_dq(Cost(3, bytes_of(read), bytes_of(out), 10 * b * n * pairs * d), arguments["query"].numel())


def with_fp32_dq(cost: Cost, elements: int) -> Cost:
    """Add the fp32 accumulator of dq, which is cleared, added to, and read."""
    accumulator = 4 * elements
    cost.read += 2 * accumulator
    cost.written += 2 * accumulator
    cost.scratch = accumulator
    return cost


Rule = Callable[[dict, object], Cost]  # (arguments by name, result) -> cost of a call

SDPA: dict[str, Rule] = {
    "_scaled_dot_product_flash_attention": sdpa,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
    "_scaled_dot_product_efficient_attention": sdpa,
    "_scaled_dot_product_efficient_attention_backward": sdpa_backward,
}


# Rules of neox's operators, from csrc/ops/<op>/<op>.h (bytes) and <op>_cuda.cu (launches).


def kernels(launches: int) -> Rule:
    """The rule of an operator that reads each tensor and writes each result once."""
    return lambda arguments, out: Cost(launches, bytes_of(arguments), bytes_of(out))


def bias_gelu_backward(arguments: dict, out: object) -> Cost:
    """A second kernel sums the partial gradients of the bias."""
    return Cost(1 if arguments["bias"] is None else 2, bytes_of(arguments), bytes_of(out))


def bias_dropout_add_backward(arguments: dict, out: object) -> Cost:
    """A second kernel sums the partial gradients of the bias."""
    return Cost(2 if arguments["has_bias"] else 1, bytes_of(arguments), bytes_of(out))


def rotary_in_place(arguments: dict, _: object) -> Cost:
    """The rotated channels of queries and keys are read and written; qkv is [b, s, g, m + 2, d]."""
    qkv, tables = arguments["qkv"], (arguments["cos"], arguments["sin"])
    b, s, g, parts, _ = qkv.shape
    touched = b * s * g * (parts - 1) * tables[0].shape[-1] * qkv.element_size()
    return Cost(1, touched + bytes_of(tables), touched)


def cross_entropy(arguments: dict, out: object) -> Cost:
    """The losses are computed from the statistics, without the logits."""
    return Cost(1, bytes_of((arguments["targets"], arguments["statistics"])), bytes_of(out))


def cross_entropy_fused(arguments: dict, out: object) -> Cost:
    """The gradient overwrites the logits."""
    return Cost(1, bytes_of(arguments), bytes_of((arguments["logits"], out)))


def cross_entropy_rescale(arguments: dict, _: object) -> Cost:
    """Only rows whose gradient is not the expected one are accessed; here there are none."""
    return Cost(1, bytes_of(arguments["dloss"]), 0)


def attention_qkv(arguments: dict, out: object) -> Cost:
    """qkv is [b, s, g, m + 2, d]. With documents one more kernel builds their table."""
    b, s, g, parts, d = arguments["qkv"].shape
    flops = 4 * b * g * (parts - 2) * attention_pairs(s, s, arguments["causal"], arguments["window"]) * d
    launches = 1 if arguments["segment_ids"] is None else 2
    return Cost(launches, bytes_of(arguments), bytes_of(out), flops)


def attention_qkv_backward(arguments: dict, out: object) -> Cost:
    """The backward with atomics. Its kernels prepare rows, clear dq, compute dk, dv and dq, and convert dq."""
    b, s, g, parts, d = arguments["qkv"].shape
    flops = 10 * b * g * (parts - 2) * attention_pairs(s, s, arguments["causal"], arguments["window"]) * d
    launches = 4 if arguments["segment_ids"] is None else 5
    return with_fp32_dq(Cost(launches, bytes_of(arguments), bytes_of(out), flops), arguments["dout"].numel())


NEOX: dict[str, Rule] = {
    "attention_qkv": attention_qkv,
    "attention_qkv_backward": attention_qkv_backward,
    "bias_dropout_add": kernels(1),
    "bias_dropout_add_backward": bias_dropout_add_backward,
    "bias_gelu": kernels(1),
    "bias_gelu_backward": bias_gelu_backward,
    "cross_entropy": cross_entropy,
    "cross_entropy_backward": kernels(1),
    "cross_entropy_fused_": cross_entropy_fused,
    "cross_entropy_rescale_": cross_entropy_rescale,
    "cross_entropy_statistics": kernels(1),
    "gated": kernels(1),
    "gated_backward": kernels(1),
    "norm": kernels(1),
    "norm_backward": kernels(2),
    "rotary": kernels(2),
    "rotary_qkv_": rotary_in_place,
}
