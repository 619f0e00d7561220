"""gated_pool against its definition: values, gradients of any order, layouts, dtypes, errors."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from gated_pool_inputs import BF16, F16, F32, F64, LAYOUTS, SHAPES, TYPE_IDS, TYPES, compare, inputs
from meta_tensors import on_meta
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import csg_ext
from csg_ext import reference


@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize("soft", [False, True])
def test_gradient_of_projection_passes_at_both_ends(dtype, soft):
    """Entries equal to the column's maximum, or 0: clip's subgradient is 1 there, whatever torch's clamp has."""
    gate = torch.tensor([[2.0, 0.0], [2.0, 4.0], [-1.0, 2.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=dtype)
    weights = torch.eye(3, dtype=dtype) if soft else labels
    (grad,) = torch.autograd.grad(csg_ext.gated_pool(x, gate, weights, project=True).sum(), gate)
    # Row c of 1 / max where 0 <= g_c; the first maximum loses sum_c x_c P_c / max.
    expected = torch.tensor([[0.5 - (1 + 3) / 2, 0.5], [1.5, 1.0 - (4 + 6 / 2) / 4], [0.0, 1.5]], dtype=dtype)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)


def test_half_gradients_of_projected_weights_are_finite():
    """1 / max^2 is no number of float16 here, but the gradient is."""
    gate = torch.tensor([[-0.4], [0.0012]], dtype=F16, requires_grad=True)
    gate64 = gate.detach().double().requires_grad_()
    x, weights = torch.tensor([[0.5]], dtype=F16), torch.tensor([[0.25, 0.5]], dtype=F16)
    (got,) = torch.autograd.grad(csg_ext.gated_pool(x, gate, weights, project=True).sum(), gate)
    out = reference.gated_pool(x.double(), gate64, weights.double(), project=True)
    (want,) = torch.autograd.grad(out.sum(), gate64)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=torch.finfo(F16).eps / 0.0012)  # of terms of 1 / max


@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_values_and_gradients(device, types, layout, pool):
    for shape, project, soft in itertools.product(SHAPES, [False, True], [False, True]):
        x, gate, labels = inputs(shape, types, device, soft=soft, project=project)
        compare(LAYOUTS[layout](x), gate, labels, pool=pool, project=project)


@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_every_cpu_variant(cpu_level, types, layout):
    for shape, pool, project in itertools.product(SHAPES, ["avg", "max"], [False, True]):
        x, gate, labels = inputs(shape, types, project=project)
        compare(LAYOUTS[layout](x), gate, labels, pool=pool, project=project)


@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_tokens(device, types):
    x, gate, labels = inputs((4, 40, 197), types, device)
    tokens = x.movedim(1, -1).contiguous()
    compare(tokens, gate, labels, channel_dim=-1)
    compare(tokens, gate, labels, channel_dim=-1, pool="max", project=True)
    grad = torch.autograd.grad(
        csg_ext.gated_pool(tokens.requires_grad_(), gate, labels, channel_dim=-1).float().sum(), tokens
    )[0]
    assert grad.shape == tokens.shape


def test_large_maps(device):
    for shape in [(1, 3, 112, 112), (2, 16, 56, 56), (1, 2, 300, 300)]:
        for layout, pool in itertools.product(["rows", "channels_last"], ["avg", "max"]):
            compare(LAYOUTS[layout](torch.rand(*shape, device=device)), torch.rand(4, shape[1], device=device),
                    torch.zeros(shape[0], dtype=torch.int64, device=device), pool=pool)  # fmt: skip


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_first_and_second_derivatives(device, pool, project, layout):
    for shape in [(4, 3), (3, 4, 5), (3, 4, 2, 3), (2, 3, 2, 1, 2)]:
        x, gate, labels = inputs(shape, (F64, F64), device, project=project)
        x, gate = LAYOUTS[layout](x).requires_grad_(), gate.requires_grad_()

        def hard(x, gate, labels=labels):
            return csg_ext.gated_pool(x, gate, labels, pool=pool, project=project, return_pooled=True)

        assert gradcheck(hard, (x, gate))
        assert gradgradcheck(hard, (x, gate))
        weights = torch.rand(shape[0], len(gate), dtype=F64, device=device, requires_grad=True)

        def soft(x, gate, weights):
            return csg_ext.gated_pool(x, gate, weights, pool=pool, project=project)

        assert gradcheck(soft, (x, gate, weights))
        assert gradgradcheck(soft, (x, gate, weights))


def test_third_derivative_matches_the_definition(device):
    x, gate, labels = inputs((3, 4, 2, 3), (F64, F64), device)
    for project, pool in itertools.product([False, True], ["avg", "max"]):
        results = []
        for f in (csg_ext.gated_pool, reference.gated_pool):
            a, g = x.clone().requires_grad_(), gate.clone().requires_grad_()
            value = f(a, g, labels, pool=pool, project=project).sin().sum()
            parts: tuple[Tensor, ...] = ()
            for _ in range(3):
                parts = torch.autograd.grad(value, (a, g), create_graph=True)
                value = sum(p.sin().sum() for p in parts)
            results.append((value.detach(), *[p.detach() for p in parts]))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_only_small_tensors_are_saved(device):
    for pool in ("avg", "max"):
        x, gate, labels = inputs((4, 8, 16, 16), (F32, F32), device)
        sizes: list[int] = []

        def keep(t: Tensor, sizes=sizes) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            csg_ext.gated_pool(x.requires_grad_(), gate.requires_grad_(), labels, pool=pool)
        assert sizes and max(sizes) <= max(4 * 8, gate.numel())


def test_partial_gradients(device):
    x, gate, labels = inputs((4, 8, 5, 5), (F32, F32), device)
    full_x, full_gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
    csg_ext.gated_pool(full_x, full_gate, labels).square().sum().backward()
    only_x, only_gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
    csg_ext.gated_pool(only_x, gate, labels).square().sum().backward()
    csg_ext.gated_pool(x, only_gate, labels).square().sum().backward()
    assert torch.equal(only_x.grad, full_x.grad) and torch.equal(only_gate.grad, full_gate.grad)
    out, pooled = csg_ext.gated_pool(full_x, full_gate, labels, return_pooled=True)
    (grad,) = torch.autograd.grad(pooled.sum(), full_x)  # only the STD path: the gate's branch has no gradient
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / 25))


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_the_pooled_gives_the_gate_no_gradient(device, soft, project):
    """None as in PyTorch's operators: zeros would let an optimizer's momentum and weight decay move the gate."""
    x, gate, labels = inputs((4, 8, 6, 6), (F32, F32), device, soft=soft, project=project)
    for create_graph, pool in itertools.product((False, True), ("avg", "max")):
        x, gate = x.detach().requires_grad_(), gate.detach().requires_grad_()
        _, pooled = csg_ext.gated_pool(x, gate, labels, pool=pool, project=project, return_pooled=True)
        grads = torch.autograd.grad(pooled.sum(), (x, gate), create_graph=create_graph, allow_unused=True)
        torch.testing.assert_close(grads[0].sum((2, 3)), torch.ones(4, 8, device=device))
        assert grads[1] is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_gradient_keeps_the_layout_or_is_a_view(device, dtype, memory_format):
    for side, pool in itertools.product((1, 5, 6, 14), ("avg", "max")):
        x, gate, labels = inputs((4, 8, side, side), (dtype, dtype), device)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        (grad,) = torch.autograd.grad(csg_ext.gated_pool(x, gate, labels, pool=pool).sum(), x)
        wide, channels_last = dtype in (F32, F64), memory_format == torch.channels_last
        short = not channels_last and side**2 < (32 if wide else 192)
        view = pool == "avg" and side > 1 and (wide if x.is_cuda else not short)
        assert grad.stride() == (8, 1, 0, 0) if view else grad.is_contiguous(memory_format=memory_format)
        x.grad = None
        csg_ext.gated_pool(x, gate, labels, pool=pool).sum().backward()
        assert x.grad.is_contiguous(memory_format=memory_format) and torch.equal(x.grad, grad)
        assert 0 not in x.grad.stride()


@pytest.mark.parametrize("types", [(F32, F32), (F64, F64), (BF16, BF16), (F16, F32)], ids=str)
@pytest.mark.parametrize("spatial", [(), (1, 1), (7, 7), (3, 5, 2)], ids=str)
def test_shared_gradient_has_the_bits_of_the_dense_ones(device, types, spatial):
    x, gate, labels = inputs((5, 37, *spatial), types, device)
    top, where = torch.ops.csg_ext.column_max(gate)
    for project in (False, True):
        columns = (top, where) if project else (None, None)
        out, pooled, index = torch.ops.csg_ext._gated_pool(x, gate, labels, *columns, 0)
        for grads in ((out, pooled), (out, None), (None, pooled)):
            rows, channels_last, shared = (
                torch.ops.csg_ext.gated_pool_backward(
                    *grads, pooled, index, gate, labels, *columns, spatial, layout, x.dtype, 0, True, True
                )
                for layout in range(3)
            )
            for other in (channels_last, shared):
                assert torch.equal(rows[0], other[0]) and torch.equal(rows[1], other[1])


@pytest.mark.parametrize("before", [torch.relu, torch.nn.functional.silu, lambda x: x * 3, lambda x: x.clone()])
def test_what_comes_before_takes_the_gradient(device, before):
    for channels_last in (False, True):
        x, gate, labels = inputs((3, 6, 4, 5), (F64, F64), device)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        x.requires_grad_()
        weight = torch.randn(6, 6, 3, 3, dtype=F64, device=device, requires_grad=True)
        found = []
        for pool in (csg_ext.gated_pool, reference.gated_pool):
            out = pool(before(torch.nn.functional.conv2d(x, weight, padding=1)), gate, labels)
            found.append(torch.autograd.grad(out.square().sum(), (x, weight)))
        torch.testing.assert_close(*found)


def test_expanded_inputs(device):
    x = torch.randn(1, 6, 1, 1, device=device).expand(4, 6, 3, 3)
    gate = torch.rand(1, 6, device=device).expand(5, 6)
    labels = torch.tensor([2], device=device).expand(4)
    compare(x, gate, labels)
    compare(torch.randn(1, 6, 3, 3, device=device).expand(4, 6, 3, 3), gate, labels, pool="max")
    out = csg_ext.gated_pool(x.requires_grad_(), gate, labels)
    out.sum().backward()  # an expanded gradient arrives in backward


def test_same_bits_for_any_number_of_threads():
    x, gate, labels = inputs((64, 130, 9, 9), (F32, F32))
    x = torch.cat([x] * 4).requires_grad_()
    labels = torch.cat([labels] * 4)
    gate.requires_grad_()
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            for pool, layout in itertools.product(["avg", "max"], LAYOUTS.values()):
                out = csg_ext.gated_pool(layout(x), gate, labels, pool=pool, project=True)
                results.append((count, [out, *torch.autograd.grad(out.square().sum(), (x, gate))]))
    finally:
        torch.set_num_threads(threads)
    per_count = len(results) // 4
    for i in range(per_count):
        for other in range(1, 4):
            for a, b in zip(results[i][1], results[i + other * per_count][1], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_a_sample_has_the_same_bits_in_any_batch(types):
    shapes = [(9, 130, 7, 7), (9, 33, 13, 5), (9, 520, 9, 9)]  # the last is cut into fewer channels where it is alone
    for shape, pool, layout in itertools.product(shapes, ["avg", "max"], LAYOUTS.values()):
        x, gate, labels = inputs(shape, types)
        x, grad = layout(x).requires_grad_(), torch.randn(9, shape[1]).to(gate.dtype)
        out = csg_ext.gated_pool(x, gate, labels, pool=pool, project=True)
        (grad_x,) = torch.autograd.grad(out, x, grad)
        for part in (slice(0, 1), slice(2, 6), slice(8, 9)):
            alone = layout(x.detach()[part].clone()).requires_grad_()
            got = csg_ext.gated_pool(alone, gate, labels[part], pool=pool, project=True)
            assert torch.equal(got, out[part])
            assert torch.equal(torch.autograd.grad(got, alone, grad[part])[0], grad_x[part])


def test_half_sums_do_not_overflow(device):
    x = torch.full((2, 3, 64, 64), 60000.0, dtype=F16, device=device)  # the sum is 2.5e8, the mean fits
    out = csg_ext.gated_pool(
        x, torch.ones(2, 3, dtype=F16, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    )
    assert torch.equal(out.cpu(), torch.full((2, 3), 60000.0, dtype=F16))


@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_nan_and_infinity(device, layout, dtype):
    x = torch.randn(6, 20, 7, 5, device=device).to(dtype)
    x[0, 3, 2, 1] = float("nan")
    x[1, 4, 6, 4] = float("inf")
    x[2, 5, 0, 0] = -float("inf")
    x[3, 6, 1, 1], x[3, 6, 5, 2] = float("inf"), float("nan")
    gate = torch.rand(3, 20, device=device).to(dtype)
    gate[1, 7] = float("nan")
    labels = torch.tensor([0, 1, 2, 0, 1, 2], device=device)
    x = LAYOUTS[layout](x)
    for pool, project in itertools.product(["avg", "max"], [False, True]):
        out, pooled = csg_ext.gated_pool(x, gate, labels, pool=pool, project=project, return_pooled=True)
        want = reference.gated_pool(x.double(), gate.double(), labels, pool=pool, project=project, return_pooled=True)
        for a, b in zip((out, pooled), want, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            torch.testing.assert_close(a.double(), b, equal_nan=True, rtol=20 * torch.finfo(dtype).eps, atol=0.02)


def test_maximum_goes_to_the_first_of_equals(device):
    for layout, dtype in itertools.product(["rows", "channels_last"], [F32, F64, F16, BF16]):
        x = torch.randint(0, 3, (4, 37, 9, 9), device=device).to(dtype)
        x[0, 0, 4, 4] = float("nan")
        x[0, 0, 7, 7] = float("nan")
        x = LAYOUTS[layout](x).requires_grad_()
        gate = torch.ones(2, 37, dtype=dtype, device=device)
        (grad,) = torch.autograd.grad(
            csg_ext.gated_pool(x, gate, torch.zeros(4, dtype=torch.int64, device=device), pool="max").sum(), x
        )
        flat = x.detach().flatten(2).double()
        nan = flat.isnan()
        best = torch.where(nan.any(2, keepdim=True), nan, flat == flat.amax(2, keepdim=True))
        first = best & (best.cumsum(2) == 1)
        assert torch.equal(grad.flatten(2) != 0, first)


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (4, 0, 3, 3), (0, 0, 2), (0, 5)])
def test_empty(device, shape):
    x = torch.randn(*shape, device=device, requires_grad=True)
    gate = torch.rand(3, shape[1], device=device, requires_grad=True)
    for labels in (torch.zeros(shape[0], dtype=torch.int64, device=device), torch.zeros(shape[0], 3, device=device)):
        for pool, project in itertools.product(["avg", "max"], [False, True]):
            out, pooled = csg_ext.gated_pool(x, gate, labels, pool=pool, project=project, return_pooled=True)
            assert out.shape == pooled.shape == shape[:2]
            grad_x, grad_gate = torch.autograd.grad(out.sum() + pooled.sum(), (x, gate))
            assert grad_x.shape == x.shape and torch.equal(grad_gate, torch.zeros_like(gate))


def test_offsets_beyond_32_bits():
    """Strides above 2^31 elements; only the touched pages of the storage exist."""
    far = 2**31 + 64
    storage = torch.empty(2 * far + 4096, dtype=F16)
    for shape, stride in [((2, 3, 8), (far, 24, 1)), ((2, 3, 8), (64, far // 2, 1)), ((2, 3, 3), (16, 1, far // 2))]:
        x = storage.as_strided(shape, stride)
        values = torch.randn(*shape).to(F16)
        x.copy_(values)
        gate, labels = torch.rand(4, 3), torch.tensor([3, 1])
        for pool in ("avg", "max"):
            got = csg_ext.gated_pool(x, gate, labels, pool=pool)
            torch.testing.assert_close(got, reference.gated_pool(values, gate, labels, pool=pool), rtol=1e-6, atol=1e-6)


def test_deepcopy_and_repeated_backward(device):
    x, gate, labels = inputs((3, 4, 2, 2), (F32, F32), device)
    gate = torch.nn.Parameter(gate)
    out = csg_ext.gated_pool(x, gate, labels)
    out.sum().backward(retain_graph=True)
    first = gate.grad.clone()
    out.sum().backward()
    assert torch.equal(gate.grad, 2 * first)
    assert torch.equal(copy.deepcopy(gate), gate)


def case(x=(4, 8, 3, 3), gate=(5, 8), labels=(4,), x_dtype=F32, gate_dtype=F32, label_dtype=torch.int64):
    def zeros(shape, dtype):
        return torch.zeros(shape, dtype=dtype)

    return zeros(x, x_dtype), zeros(gate, gate_dtype), zeros(labels, label_dtype)


def with_label(value):
    x, gate, labels = case()
    labels[3] = value
    return x, gate, labels


def with_nan_weight():
    x, gate, weights = case(labels=(4, 5), label_dtype=F32)
    weights[2, 1] = float("nan")
    return x, gate, weights


BAD = [
    (case(x=(4,)), {}, ValueError, r"x must have the shape \(N, K, \*spatial\), got \(4,\)"),
    (
        case(gate=(5, 7)),
        {},
        ValueError,
        r"gate must have a column for each of the K = 8 channels, got the shape \(5, 7\)",
    ),
    (case(gate=(8,)), {}, ValueError, r"gate must have the shape \(C, K\), got \(8,\)"),
    (
        case(labels=(3,)),
        {},
        ValueError,
        r"labels must have the shape \(N,\) = \(4,\), or be floating-point rows .*, got int64 of \(3,\)",
    ),
    (
        case(labels=(4, 1)),
        {},
        ValueError,
        r"labels must have the shape \(N,\) = \(4,\), or be floating-point rows .*, got int64 of \(4, 1\)",
    ),
    (case(labels=(4, 5)), {}, ValueError, r"labels must .* or be floating-point rows \(N, C\), got int64 of \(4, 5\)"),
    (case(label_dtype=torch.int32), {}, TypeError, r"labels must be int64 class indices .*, got int32"),
    (case(label_dtype=torch.bool), {}, TypeError, r"labels must be int64 class indices .*, got bool"),
    (case(x_dtype=torch.int64), {}, TypeError, r"x must be float32, float64, float16 or bfloat16, got int64"),
    (case(gate_dtype=torch.int64), {}, TypeError, r"gate must be float32, float64, float16 or bfloat16, got int64"),
    (case(gate_dtype=F64), {}, TypeError, r"gate must have the dtype of x, or be float32 with half x, got float64"),
    (case(gate_dtype=F16), {}, TypeError, r"gate must have the dtype of x, or be float32 with half x, got float16"),
    (with_label(12), {}, ValueError, r"labels\[3\] = 12 is outside \[0, 5\)"),
    (with_label(-1), {}, ValueError, r"labels\[3\] = -1 is outside \[0, 5\)"),
    (with_nan_weight(), {}, ValueError, r"labels\[2, 1\] is NaN"),
    (
        case(labels=(4, 6), label_dtype=F32),
        {},
        ValueError,
        r"floating-point labels must have the shape \(N, C\).*\(4, 6\)",
    ),
    (case(labels=(4,), label_dtype=F32), {}, ValueError, r"floating-point labels must have the shape \(N, C\).*\(4,\)"),
    (case(x=(4, 8, 0, 3)), {}, ValueError, r"x must have at least one spatial position to pool, got .*\(4, 8, 0, 3\)"),
    (case(), {"pool": "median"}, ValueError, r"pool must be 'avg' or 'max', got 'median'"),
    (case(), {"channel_dim": 2}, ValueError, r"channel_dim must be 1 or -1, got 2"),
    (case(gate=(8,)), {"project": True}, ValueError, r"gate must have the shape \(C, K\), got \(8,\)"),
    (case(gate_dtype=torch.int32), {"project": True}, TypeError, r"gate must be float32, .* or bfloat16, got int32"),
    (case(gate=(0, 8)), {"project": True}, ValueError, r"gate must have at least one row, got \(0, 8\)"),
    (([[1.0]], *case()[1:]), {}, TypeError, r"x must be a torch.Tensor, got list"),
    ((case()[0], case()[1], [0, 1, 2, 3]), {}, TypeError, r"labels must be a torch.Tensor, got list"),
]


@pytest.mark.parametrize("args, options, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_one_clear_sentence(args, options, error, message):
    with pytest.raises(error, match=rf"^gated_pool: {message}[^\n]*$"):
        csg_ext.gated_pool(*args, **options)


BAD_OF_ANY_VALUES = [
    case for case in BAD if all(isinstance(t, torch.Tensor) for t in case[0]) and "labels\\[" not in case[3]
]


@pytest.mark.parametrize("args, options, error, message", BAD_OF_ANY_VALUES, ids=range(len(BAD_OF_ANY_VALUES)))
def test_what_has_no_values_is_refused_with_the_same_sentences(args, options, error, message):
    with pytest.raises(error, match=rf"^gated_pool: {message}[^\n]*$"):
        csg_ext.gated_pool(*(t.to("meta") for t in args), **options)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(csg_ext.gated_pool, backend="eager")(*args, **options)


def backward_arguments(**changed):
    matrix = torch.rand(2, 3)
    arguments = {
        "grad_out": matrix, "grad_pooled": matrix, "pooled": matrix, "index": torch.zeros(2, 3, dtype=torch.int64),
        "gate": torch.rand(5, 3), "labels": torch.tensor([0, 4]), "col_max": torch.rand(3),
        "col_arg": torch.zeros(3, dtype=torch.int64), "spatial": [4], "layout": 0, "x_type": F32, "pool": 1,
        "need_x": True, "need_gate": True,
    }  # fmt: skip
    return arguments | changed


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x_type": torch.int32, "need_x": False}, "x must be float32, float64, float16 or bfloat16, got int32"),
        ({"x_type": torch.int64}, "x must be float32, float64, float16 or bfloat16, got int64"),
        ({"x_type": F64}, "gate must have the dtype of x, or be float32 with half x, got float32"),
        ({"pool": 2}, r"pool must be 0 \(avg\) or 1 \(max\), got 2"),
        ({"spatial": [2, 0]}, "x must have at least one spatial position to pool"),
        ({"pooled": torch.rand(6)}, r"pooled must have the shape \(N, K\), got \(6,\)"),
        ({"grad_out": torch.rand(3, 3)}, "gradients, pooled and index must have the shape"),
        ({"grad_pooled": torch.rand(2, 3, dtype=F64)}, "gradients, pooled and index must have the shape"),
        ({"index": torch.rand(2, 3)}, "gradients, pooled and index must have the shape"),
        ({"labels": None}, r"without labels gate must have a row for each sample, got \(5, 3\) for N = 2"),
        ({"col_arg": None}, "col_max and col_arg come together"),
        ({"col_max": torch.rand(4)}, r"col_max and col_arg must be what column_max\(gate\) returns"),
        ({"col_max": torch.rand(6)[::2]}, r"col_max and col_arg must be what column_max\(gate\) returns"),
        ({"col_arg": torch.zeros(1).long().expand(3)}, r"col_max and col_arg must be what column_max\(gate\) returns"),
        ({"layout": 3}, r"layout must be 0 \(contiguous\), 1 \(channels last\) or for avg 2 .*, got 3"),
        ({"layout": 2}, r"layout must be 0 \(contiguous\), 1 \(channels last\) or for avg 2 .*, got 2"),
        ({"layout": -1}, r"layout must be 0 \(contiguous\), 1 \(channels last\) or for avg 2 .*, got -1"),
    ],
)
def test_the_backward_operator_refuses_the_same_with_and_without_values(changed, message):
    operator, arguments = torch.ops.csg_ext.gated_pool_backward, backward_arguments(**changed)
    operator(**backward_arguments())
    for device in ("cpu", "meta"):
        moved = {k: on_meta(v) if device == "meta" else v for k, v in arguments.items()}
        with pytest.raises(RuntimeError, match=rf"^gated_pool: {message}[^\n]*$"):
            operator(**moved)


def test_meta_tensors_give_shapes_and_mixed_devices_an_error():
    x, gate, labels = (t.to("meta") for t in case())
    assert csg_ext.gated_pool(x, gate, labels, pool="max", project=True).shape == (4, 8)
    with pytest.raises(
        ValueError, match=r"^gated_pool: gate must be on the device of the other tensors, cpu, got meta"
    ):
        csg_ext.gated_pool(case()[0], gate, case()[2])


def test_changed_label_is_noticed_before_backward():
    x, gate, labels = case()
    out = csg_ext.gated_pool(x, gate.requires_grad_(), labels)
    labels[0] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("position", [-1, 6, 2**63 - 1, -(2**63)])
def test_backward_writes_at_no_index_outside_the_map(position, channels_last):
    """The operator can be called without the forward pass that made the index."""
    pooled, gate, index = torch.rand(2, 3), torch.rand(2, 3), torch.full((2, 3), 5)
    index[1, 2] = position
    with pytest.raises(RuntimeError, match=r"^gated_pool: index must hold positions in \[0, 6\), got one outside"):
        torch.ops.csg_ext.gated_pool_backward(
            pooled, None, pooled, index, gate, None, None, None, [2, 3], int(channels_last), F32, 1, True, False
        )
