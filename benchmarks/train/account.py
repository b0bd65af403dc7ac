"""What a GPU does in a part of a program, counted on fake tensors: kernels, bytes, FLOPs, memory at the peak.

    with FakeCuda(), Account() as account:
        ...
    print(account.total("launches"))

The rules, the same for every model:
- An operator of torch is one kernel, which reads each input once and writes each output once. That is a lower bound:
  a matrix product with split k, or the gradient of an embedding, takes several. Views and allocations are none.
- Operators over lists of tensors (`_foreach_*`, `_fused_adamw_`) are as many kernels as torch's multi_tensor_apply
  launches.
- Our operators are the kernels that their CUDA launchers start, and the bytes that the headers in csrc/ops state,
  which the emulator's tests hold.
- Attention is counted over the visible pairs of queries and keys.
- Collectives are none: their time is that of a link, not of the device's memory.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# launch nothing although they are neither views nor in-place
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
    "_local_scalar_dense", "device", "_fused_sdp_choice", "record_stream", "is_pinned", "resize_", "set_",
}  # fmt: skip
# do not read what they overwrite
WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "_foreach_zero_"}
# arguments that are not read in full: by name, those that are read as far as the output has elements, or not at all
LOOKUPS = {"embedding": 0, "gather": 0, "index": 0, "index_select": 0}
UNREAD = {"nll_loss_forward": (0,), "nll_loss_backward": (1,)} | dict.fromkeys(
    ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), (0,)
)
UNWRITTEN = {"_fused_adamw_": (1,)}  # arguments that the schema marks as changed, and this call leaves as they are
CHUNK, BLOCKS = 65536, 320  # of ATen/native/cuda/MultiTensorApply.cuh
MOST_TENSORS = (110, 64, 48, 36, 30)  # per launch, by the number of lists


@dataclass
class Cost:
    """What an operator asks of the device.

    Attributes:
        launches: kernels, and fills of memory.
        read, written: bytes.
        flops: floating-point operations of matrix products and attention.
        scratch: bytes that the operator allocates for itself.
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
        phase: of the program: the account's at the call.
        name: of the operator, such as aten.mm.
        shape: of its first tensor.
        cost: what it asks of the device.
    """

    phase: str
    name: str
    shape: tuple[int, ...]
    cost: Cost


class Account(TorchDispatchMode):
    """Records every operator on CUDA tensors. Enter it inside of a FakeCuda.

    Attributes:
        rows: the calls so far.
        phase: name of the part of the program that runs; set it as the program proceeds.
        memory: what is allocated.
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
        """The phase to which the operator that just ran belongs."""
        return self.phase

    def start(self) -> None:
        """Forget the rows and the peak; what is allocated stays."""
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

    def roofline(self, flops: float, bandwidth: float) -> float:
        """Seconds if every operator is bound by the products or by memory, whichever takes longer."""
        return sum(max(row.cost.flops / flops, row.cost.moved / bandwidth) for row in self.rows)


class Memory:
    """Bytes allocated on the device: now, and at the peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.known: set[int] = set()

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the memory of tensors that is not counted yet, until it is freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            size = storage.nbytes()
            self.now += size
            weakref.finalize(storage, self.free, storage._cdata, size)
        self.peak = max(self.peak, self.now)

    def free(self, key: int, size: int) -> None:
        """The memory was freed."""
        self.known.discard(key)
        self.now -= size

    def borrow(self, size: int) -> None:
        """Memory that an operator allocates and frees."""
        self.peak = max(self.peak, self.now + size)


def name_of(function: torch._ops.OpOverload) -> str:
    """The operator's name without namespace and overload."""
    return function.overloadpacket.__name__


def on_device(tree: object) -> list[torch.Tensor]:
    """The CUDA tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"]


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements of a tensor, which may be expanded."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride or not size) * tensor.element_size()


def distinct(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Without repetitions of the same memory."""
    return list({(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors}.values())


def sum_of(tree: object) -> int:
    """Bytes of the distinct CUDA tensors among arguments or results."""
    return sum(size_of(tensor) for tensor in distinct(on_device(tree)))


def is_view(function: torch._ops.OpOverload) -> bool:
    """Whether the results alias the arguments and nothing is written."""
    schema = function._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


def cost_of(function: torch._ops.OpOverload, args: tuple, kwargs: dict, out: object) -> Cost:
    """The cost of one call."""
    name = name_of(function)
    if function.namespace == "neox":
        return OURS[name](args, out) if name in OURS else generic(function, args, kwargs, out)
    if name in FREE or function.namespace == "c10d" or is_view(function):
        return Cost()
    cost = ATTENTION[name](args, out) if name in ATTENTION else generic(function, args, kwargs, out)
    if name.startswith(("_foreach", "_fused")):
        cost.launches = multi_tensor_launches([arg for arg in args if isinstance(arg, (list, tuple))])
    packet = function.overloadpacket
    if name not in ATTENTION and packet in flop_registry:
        cost.flops = flop_registry[packet](*args, **kwargs, out_val=out)
    return cost


def generic(function: torch._ops.OpOverload, args: tuple, kwargs: dict, out: object) -> Cost:
    """One kernel that reads every input and writes every output once."""
    name, schema = name_of(function), function._schema
    read, written = [], []
    for i, parameter in enumerate(schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(parameter.name)
        writes = parameter.alias_info is not None and parameter.alias_info.is_write
        writes = writes and i not in UNWRITTEN.get(name, ())
        if writes:
            written.append(value)
        unread = i in UNREAD.get(name, ()) or LOOKUPS.get(name) == i or parameter.is_out
        if not unread and not (writes and name in WRITE_ONLY):
            read.append(value)
    if not written:
        written = [out]
    extra = sum_of(out) if name in LOOKUPS else 0
    return Cost(1, sum_of(read) + extra, sum_of(written))


def multi_tensor_launches(lists: Sequence[Sequence[torch.Tensor]]) -> int:
    """Kernels that multi_tensor_apply launches: a launch is full at BLOCKS chunks, or at its number of tensors."""
    if not lists or not lists[0]:
        return 0
    launches = tensors = blocks = 0
    most = MOST_TENSORS[min(len([one for one in lists if one]), len(MOST_TENSORS)) - 1]
    for tensor in lists[0]:
        if tensor.numel() == 0:
            continue
        tensors += 1
        chunks = -(-tensor.numel() // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            if blocks == BLOCKS or (tensors == most and chunk == chunks - 1):
                launches, blocks = launches + 1, 0
                tensors = 0 if chunk == chunks - 1 else 1
    return launches + (blocks > 0)


def attention_pairs(s: int, t: int, causal: bool) -> float:
    """Visible pairs of a query and a key per head."""
    return s * t - s * (s - 1) / 2 if causal else s * t


def torch_attention(args: tuple, out: object, *, causal: bool) -> Cost:
    """Forward of torch's fused attention: q, k, v [b, n, s, d]."""
    q, k = args[0], args[1]
    b, n, s, d = q.shape
    written = [leaf for leaf in on_device(out) if leaf.dtype.is_floating_point]
    return Cost(1, sum_of(args[:4]), sum_of(written), 4 * b * n * attention_pairs(s, k.shape[2], causal) * d)


def torch_attention_backward(args: tuple, out: object, *, causal: bool) -> Cost:
    """Backward of torch's fused attention: dout, q, k, v, out, lse; three kernels, with dq summed in fp32."""
    q, k = args[1], args[2]
    b, n, s, d = q.shape
    floating = [a for a in on_device(args) if a.dtype.is_floating_point]
    return with_fp32_dq(
        Cost(3, sum_of(floating), sum_of(out), 10 * b * n * attention_pairs(s, k.shape[2], causal) * d), q.numel(), s
    )


def with_fp32_dq(cost: Cost, elements: int, rows_per_head: int) -> Cost:
    """Add the fp32 sums of dq: cleared, added to, and read; and delta and lse per row."""
    sums = 4 * elements
    cost.read += 2 * sums
    cost.written += 2 * sums
    cost.scratch = sums
    return cost


ATTENTION: dict[str, Callable[[tuple, object], Cost]] = {
    "_scaled_dot_product_flash_attention": lambda args, out: torch_attention(args, out, causal=args[4]),
    "_scaled_dot_product_efficient_attention": lambda args, out: torch_attention(
        args, out, causal=args[6] if len(args) > 6 else False
    ),
    "_scaled_dot_product_flash_attention_backward": lambda args, out: torch_attention_backward(
        args, out, causal=args[11]
    ),
    "_scaled_dot_product_efficient_attention_backward": lambda args, out: torch_attention_backward(
        args, out, causal=args[11] if len(args) > 11 else False
    ),
}


# What our CUDA launchers start and move, by operator of torch.ops.neox: csrc/ops/<op>/<op>.h and <op>_cuda.cu.


def simple(launches: int) -> Callable[[tuple, object], Cost]:
    """Reads its tensors and writes its results once."""
    return lambda args, out: Cost(launches, sum_of(args), sum_of(out))


def bias_gelu_backward(args: tuple, out: object) -> Cost:
    """The sums of the bias's gradient take a second kernel."""
    return Cost(1 if args[2] is None else 2, sum_of(args), sum_of(out))


def bias_dropout_add_backward(args: tuple, out: object) -> Cost:
    """One pass over dy, and a second kernel for the bias."""
    return Cost(2 if args[3] else 1, sum_of(args), sum_of(out))


def rotary_in_place(args: tuple, _: object) -> Cost:
    """The rotated channels of queries and keys, in place."""
    qkv, cos, sin = args[:3]
    b, s, g, parts, _ = qkv.shape
    touched = b * s * g * (parts - 1) * cos.shape[-1] * qkv.element_size()
    return Cost(1, touched + sum_of((cos, sin)), touched)


def logits_pass(reads: int, writes: int) -> Callable[[tuple, object], Cost]:
    """Passes over the logits, the first argument, besides a few bytes per row."""
    return lambda args, out: Cost(
        1, reads * size_of(args[0]) + sum_of(args[1:]), writes * size_of(args[0]) + sum_of(out)
    )


def loss_of_rows(args: tuple, out: object) -> Cost:
    """Statistics to losses."""
    return Cost(1, sum_of(args[1:]), sum_of(out))


def rescale(args: tuple, _: object) -> Cost:
    """Rows whose gradient is as expected are not accessed."""
    return Cost(1, sum_of(args[1:]), 0)


def packed_attention(args: tuple, out: object) -> Cost:
    """qkv [b, s, g, m + 2, d]; documents take a table of their own."""
    qkv, segments, causal = args[0], args[1], args[4]
    b, s, g, parts, d = qkv.shape
    flops = 4 * b * g * (parts - 2) * attention_pairs(s, s, causal) * d
    return Cost(1 if segments is None else 2, sum_of(args), sum_of(out), flops)


def packed_attention_backward(args: tuple, out: object) -> Cost:
    """dout, qkv, out, lse: rows prepared, dq cleared, dk and dv with sums of dq, dq finished."""
    dout, qkv = args[:2]
    b, s, g, parts, d = qkv.shape
    flops = 10 * b * g * (parts - 2) * attention_pairs(s, s, args[7]) * d
    launches = 4 if args[4] is None else 5
    return with_fp32_dq(Cost(launches, sum_of(args), sum_of(out), flops), dout.numel(), s)


OURS: dict[str, Callable[[tuple, object], Cost]] = {
    "attention_qkv": packed_attention,
    "attention_qkv_backward": packed_attention_backward,
    "bias_dropout_add": simple(1),
    "bias_dropout_add_backward": bias_dropout_add_backward,
    "bias_gelu": simple(1),
    "bias_gelu_backward": bias_gelu_backward,
    "cross_entropy": loss_of_rows,
    "cross_entropy_backward": logits_pass(1, 0),
    "cross_entropy_fused_": logits_pass(1, 1),
    "cross_entropy_rescale_": rescale,
    "cross_entropy_statistics": logits_pass(1, 0),
    "gated": simple(1),
    "gated_backward": simple(1),
    "norm": simple(1),
    "norm_backward": simple(2),
    "rotary": simple(2),
    "rotary_qkv_": rotary_in_place,
}


def largest(account: Account, count: int) -> Iterator[tuple[str, str, Cost]]:
    """(phase, operator, cost) with the most bytes moved."""
    ranked = sorted(account.by_name().items(), key=lambda item: -item[1].moved)
    for (phase, name), cost in ranked[:count]:
        yield phase, name, cost
