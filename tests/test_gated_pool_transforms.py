"""gated_pool under torch.compile, export, autocast, vmap, forward mode and torch.func."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch._dynamo.testing
from gated_pool_inputs import BF16, F32, F64, inputs
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import csg_ext
from csg_ext import reference


def test_opcheck(device):
    ops = torch.ops.csg_ext
    for shape, pool, types in itertools.product([(4, 6, 3, 3), (4, 6)], [0, 1], [(F32, F32), (BF16, F32)]):
        x, gate, labels = inputs(shape, types, device)
        for grad in (False, True):
            x, gate = x.detach().requires_grad_(grad), gate.detach().requires_grad_(grad)
            torch.library.opcheck(ops.gated_pool.default, (x, gate, labels, None, None, pool))
        top, where = ops.column_max(gate.detach())
        torch.library.opcheck(ops.gated_pool.default, (x, gate, labels, top, where, pool))
        x, gate = x.detach(), gate.detach()
        torch.library.opcheck(ops._gated_pool.default, (x, gate, labels, None, None, pool))
        out, pooled, index = ops._gated_pool(x, gate, labels, None, None, pool)
        for layout in (0, 1, 2)[: 3 - pool]:
            torch.library.opcheck(
                ops.gated_pool_backward.default,
                (out, None, pooled, index, gate, labels, top, where, shape[2:], layout, types[0], pool, True, True),
            )


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("soft", [False, True])
def test_compile_in_one_graph(device, pool, soft):
    torch._dynamo.reset()

    def step(x, gate, labels):
        out, pooled = csg_ext.gated_pool(x.relu(), gate, labels, pool=pool, project=True, return_pooled=True)
        return (out * 2 + pooled).tanh()

    def alone(x, gate, labels):
        return csg_ext.gated_pool(x, gate, labels, pool=pool, project=True)

    x, gate, labels = inputs((8, 16, 7, 7), (F32, F32), device, soft=soft, project=True)
    compiled_alone = torch.compile(alone, fullgraph=True)(x, gate, labels)
    if soft and device == "cuda":  # a division of the composed path, which Triton approximates
        torch.testing.assert_close(compiled_alone, alone(x, gate, labels))
    else:
        assert torch.equal(compiled_alone, alone(x, gate, labels))
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in [(8, 16, 5, 5), (5, 16, 7, 4)]:
        x, gate, labels = inputs(shape, (F32, F32), device, soft=soft, project=True)
        grads = []
        for f in (step, compiled):
            a, g = x.clone().requires_grad_(), gate.clone().requires_grad_()
            out = f(a, g, labels)
            grads.append((out.detach(), *torch.autograd.grad(out.sum(), (a, g))))
        for eager, graph in zip(*grads, strict=True):
            torch.testing.assert_close(graph, eager)


def test_sizes_that_change_or_depend_on_values_compile_once(device):
    """The checks of shapes while a graph is made bind no size to a number."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def chosen(x, gate, labels, keep):
        at = keep.nonzero()[:, 0]
        return csg_ext.gated_pool(x[at], gate, labels[at], pool="max", project=True)

    def whole(x, gate, labels, keep):
        return csg_ext.gated_pool(x, gate, labels, pool="max", project=True)

    for f in (whole, chosen):
        torch._dynamo.reset()
        counter.frame_count = 0
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
            for shape in [(8, 16, 5, 7), (5, 16, 7, 4), (9, 24, 3, 2)]:
                x, gate, labels = inputs(shape, (F32, F32), device)
                keep = torch.arange(len(x), device=device) % 3 > 0
                assert torch.equal(compiled(x, gate, labels, keep), f(x, gate, labels, keep))
        assert counter.frame_count == (os.environ.get("TORCHDYNAMO_DISABLE") != "1")  # it is under the sanitizers


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("axis", [1, 2])
def test_gradients_where_sizes_depend_on_values(device, axis, pool):
    """Channels or positions chosen by a mask: no layout may be decided by comparing their number."""

    def chosen(x, gate, labels, keep):
        at = keep.nonzero()[:, 0]
        gate = gate[:, at] if axis == 1 else gate
        return csg_ext.gated_pool(x.index_select(axis, at), gate, labels, pool=pool).sin()

    for channels_last in (False, True):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            compiled = torch.compile(chosen, backend="aot_eager", fullgraph=True)
            x, gate, labels = inputs((3, 6, 40), (F32, F32), device)
            x = x.mT.contiguous().mT if channels_last else x
            x, gate = x.requires_grad_(), gate.requires_grad_()
            for step in (2, 3):
                keep = torch.arange(x.shape[axis], device=device) % step > 0
                found = [torch.autograd.grad(f(x, gate, labels, keep).sum(), (x, gate)) for f in (chosen, compiled)]
                torch.testing.assert_close(*found)


def test_export(device):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Parameter(torch.rand(6, 16))

        def forward(self, x, labels):
            return csg_ext.gated_pool(x, self.gate, labels, project=True)

    head = Head().to(device)
    x, _, labels = inputs((8, 16, 5, 5), (F32, F32), device)
    batch = torch.export.Dim("batch")
    program = torch.export.export(head, (x, labels), dynamic_shapes={"x": {0: batch}, "labels": {0: batch}})
    assert any("csg_ext" in str(node.target) for node in program.graph.nodes)
    x, _, labels = inputs((3, 16, 5, 5), (F32, F32), device)
    torch.testing.assert_close(program.module()(x, labels), head(x, labels))


def test_autocast(device):
    conv = torch.nn.Conv2d(3, 8, 3).to(device)
    gate = torch.nn.Parameter(torch.rand(4, 8, device=device))
    image, labels = torch.randn(5, 3, 9, 9, device=device), torch.randint(0, 4, (5,), device=device)
    for weights in (labels, torch.nn.functional.one_hot(labels, 4).float()):
        with torch.autocast(device, dtype=BF16):
            features = conv(image)
            out = csg_ext.gated_pool(features, gate, weights)
        assert features.dtype == BF16 and out.dtype == F32  # the gate's row is not rounded to bf16
        torch.testing.assert_close(out, reference.gated_pool(features.float(), gate, weights))
        out.sum().backward()
        assert gate.grad.dtype == F32


def test_vmap_is_a_larger_batch(device):
    x = torch.randn(5, 3, 4, 2, 2, device=device)
    gates, labels = torch.rand(5, 6, 4, device=device), torch.randint(0, 6, (5, 3), device=device)
    for pool in ("avg", "max"):
        for dims in [(0, 0, 0), (0, None, 0), (0, None, None), (None, 0, 0), (None, 0, None), (1, 0, 0)]:
            args = [
                x.movedim(0, dims[0]) if dims[0] is not None else x[0],
                gates if dims[1] is not None else gates[0],
                labels if dims[2] is not None else labels[0],
            ]

            def call(x, gate, labels, pool=pool):
                return csg_ext.gated_pool(x, gate, labels, pool=pool)

            got = torch.vmap(call, in_dims=dims)(*args)
            for b in range(5):
                parts = [a if d is None else a.select(d, b) for a, d in zip(args, dims, strict=True)]
                assert torch.equal(got[b], call(*parts))


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_forward_mode(device, pool, project, soft):
    x, gate, labels = inputs((4, 3, 5, 2), (F64, F64), device, soft=soft, project=project)

    def ours(x, gate):
        return csg_ext.gated_pool(x, gate, labels, pool=pool, project=project)

    def wanted(x, gate):
        return reference.gated_pool(x, gate, labels, pool=pool, project=project)

    tangents = torch.randn_like(x), torch.randn_like(gate)
    primal, tangent = torch.func.jvp(wanted, (x, gate), tangents)
    torch.testing.assert_close(torch.func.jvp(ours, (x, gate), tangents), (primal, tangent))
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(ours(*map(forward_ad.make_dual, (x, gate), tangents)))
    torch.testing.assert_close((got.primal, got.tangent), (primal, tangent))
    both = [torch.func.jacfwd(ours, (0, 1))(x, gate), torch.func.jacrev(ours, (0, 1))(x, gate)]
    torch.testing.assert_close(*both)
    hessians = [torch.func.hessian(lambda x, g, f=f: f(x, g).sin().sum(), (0, 1))(x, gate) for f in (ours, wanted)]
    torch.testing.assert_close(*hessians)


def test_forward_mode_refuses_labels_outside():
    x, gate, labels = inputs((4, 3, 5), (F64, F64), "cpu")
    labels[1] = -1
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"gated_pool: labels\[1\] = -1 is outside"):
        csg_ext.gated_pool(forward_ad.make_dual(x, x), gate, labels)
    with pytest.raises(ValueError, match=r"gated_pool: labels\[1\] = -1 is outside"):
        torch.func.jvp(lambda x: csg_ext.gated_pool(x, gate, labels.clone()), (x,), (x,))


def test_soft_labels_under_transforms_and_modes():
    """Values that may not be looked at: of a batch, of a tracer, of no memory."""
    x, gate, weights = torch.randn(4, 3, 2), torch.rand(5, 3), torch.rand(6, 4, 5)
    got = torch.vmap(csg_ext.gated_pool, (None, None, 0))(x, gate, weights)
    torch.testing.assert_close(got, torch.stack([csg_ext.gated_pool(x, gate, w) for w in weights]))
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda *a: csg_ext.gated_pool(*a), tracing_mode=mode)(x, gate, weights[0])
        torch.testing.assert_close(graph(x, gate, weights[1]), got[1])
    assert csg_ext.gated_pool(*(t.to("meta") for t in (x, gate, weights[0]))).shape == (4, 3)


def test_functional_gradients(device):
    x, gate, labels = inputs((3, 4, 2, 2), (F64, F64), device)

    def loss(gate):
        return csg_ext.gated_pool(x, gate, labels).square().sum()

    got = torch.func.grad(loss)(gate)
    want = torch.func.grad(lambda g: reference.gated_pool(x, g, labels).square().sum())(gate)
    torch.testing.assert_close(got, want)
    per_sample = torch.vmap(torch.func.grad(lambda x, g, y: csg_ext.gated_pool(x[None], g, y[None]).square().sum()),
                            in_dims=(0, None, 0))(x, gate, labels)  # fmt: skip
    assert per_sample.shape == x.shape


def transformed(kind, f, x, gate):
    """A derivative, or a batch of values, of f(x, gate) by one of PyTorch's transforms, as a list."""
    tangents = (x.flip(0).sin(), gate.flip(0).sin())
    if kind == "grad":
        return torch.func.grad(lambda *a: f(*a).square().sum(), (0, 1))(x, gate)
    if kind == "vmap":
        return [torch.vmap(f, (0, None))(torch.stack([x, x.cos()]), gate)]
    if kind == "jvp":
        return torch.func.jvp(f, (x, gate), tangents)
    if kind == "jacfwd":
        return torch.func.jacfwd(f, (0, 1))(x, gate)
    with forward_ad.dual_level():
        return list(forward_ad.unpack_dual(f(*map(forward_ad.make_dual, (x, gate), tangents))))


def torch_compiles(kind, x, gate):
    """Whether torch compiles a transform of its own operators: 2.10 does not compile jacfwd."""

    def own(x, gate):
        return transformed(kind, lambda x, gate: x.mean((2, 3)) * gate[0], x, gate)

    try:
        return bool(torch.compile(own, backend="aot_eager", fullgraph=kind != "dual")(x, gate))
    except RuntimeError:
        assert torch.__version__ < "2.13", "of newer ones none is known"
        return False


@pytest.mark.parametrize("kind", ["grad", "vmap", "jvp", "jacfwd", "dual"])
def test_transforms_give_the_same_compiled(device, kind):
    """Neither zeros nor None in place of a derivative."""
    x, gate, labels = inputs((3, 4, 2, 2), (F64, F64), device)
    weights = torch.rand(3, len(gate), dtype=F64, device=device)
    calls = {
        "avg": lambda f, x, gate: f.gated_pool(x, gate, labels),
        "max": lambda f, x, gate: f.gated_pool(x, gate, labels, pool="max"),
        "project": lambda f, x, gate: f.gated_pool(x, gate, labels, project=True),
        "soft": lambda f, x, gate: f.gated_pool(x, gate, weights),
        "soft, project": lambda f, x, gate: f.gated_pool(x, gate, weights, project=True),
        "tokens": lambda f, x, gate: f.gated_pool(x.flatten(2).mT, gate, labels, channel_dim=-1),
        "project_gate": lambda f, x, gate: f.project_gate(gate) * x.mean((0, 2, 3)),
    }
    for name, call in calls.items():
        torch._dynamo.reset()
        want = transformed(kind, lambda x, gate, call=call: call(reference, x, gate), x, gate)

        def ours(x, gate, call=call):
            return transformed(kind, lambda x, gate: call(csg_ext, x, gate), x, gate)

        forms = [ours]
        if torch_compiles(kind, x, gate):
            forms.append(torch.compile(ours, backend="aot_eager", fullgraph=kind != "dual"))
        for f in forms:
            got = f(x, gate)
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_a_label_outside_is_nan_under_a_compiled_transform(device):
    """Its value is not known when the graph is made; -1 must not be the last class."""
    x, gate, labels = inputs((3, 4, 2, 2), (F64, F64), device)
    labels[1] = -1

    def tangent(x, labels):
        return torch.func.jvp(lambda x: csg_ext.gated_pool(x, gate, labels), (x,), (x,))[1]

    compiled = torch.compile(tangent, backend="aot_eager")
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # under the sanitizers: it runs eagerly, where values are known
        with pytest.raises(ValueError, match=r"labels\[1\] = -1 is outside"):
            compiled(x, labels)
        return
    got = compiled(x, labels)
    assert got[1].isnan().all() and not got[::2].isnan().any()


def test_tensors_kept_from_a_transform(device):
    """What torch.func.grad has traced stays in use afterwards, behind wrappers whose level has ended."""
    x, gate, labels = inputs((3, 4, 2, 2), (F32, F32), device)
    kept = []

    def loss(x, gate):
        kept.extend([x * 2, gate * 2])
        return csg_ext.gated_pool(*kept, labels).sum()

    torch.func.grad(loss, argnums=(0, 1))(x, gate)
    x, gate = x.requires_grad_(), gate.requires_grad_()
    for args, plain, wanted in [
        ((kept[0], gate), (2 * x.detach(), gate), gate),
        ((x, kept[1]), (x, 2 * gate.detach()), x),
    ]:
        for project in (False, True):
            got = csg_ext.gated_pool(*args, labels, project=project)
            want = reference.gated_pool(*plain, labels, project=project)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(
                torch.autograd.grad(got.square().sum(), wanted), torch.autograd.grad(want.square().sum(), wanted)
            )
