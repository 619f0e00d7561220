"""project_gate, gate_step_ and the projected optimizers against their definitions and torch.optim."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import pytest
import torch
from tolerances import accumulator
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import csg_ext
from csg_ext import reference
from csg_ext.optim import ProjectedOptimizer, ProjectedSGD

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 7), (2, 64), (10, 64), (7, 129), (100, 33), (1000, 40), (3, 1025), (520, 201)]
METHODS = ["scale", "euclidean"]


def gates(shape, dtype, device="cpu"):
    gate = torch.randn(*shape, device=device)
    gate[:, ::7] = -gate[:, ::7].abs()  # no positive entry
    gate[:, 1::11] = 0.5  # ties
    if shape[1] > 3:
        gate[0, 3] = float("nan")
    return gate.to(dtype)


def in_feasible_set(gate: torch.Tensor) -> bool:
    """V_G: entries in [0, 1], every column's maximum exactly 1; columns of NaN aside."""
    gate = gate[:, ~gate.isnan().any(0)]
    return bool((gate >= 0).all() and (gate <= 1).all() and (gate.amax(0) == 1).all())


def assert_close(got, want, dtype):
    # One rounding to the dtype, and a handful in the accumulator.
    eps, acc = torch.finfo(dtype).eps, torch.finfo(accumulator(dtype)).eps
    torch.testing.assert_close(got.double(), want.double(), rtol=eps + 8 * acc, atol=8 * acc, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection(device, dtype, method):
    for shape in SHAPES:
        gate = gates(shape, dtype, device)
        want = reference.project_gate(gate.double(), method)
        got = csg_ext.project_gate(gate, method)
        assert_close(got, want, dtype)
        assert in_feasible_set(got)
        assert torch.equal(gate.isnan().any(0), got.isnan().all(0))
        again = gate.clone()
        version = again._version
        assert csg_ext.project_gate_(again, method) is again
        assert torch.equal(again.nan_to_num(5), got.nan_to_num(5)) and again._version > version
        fixed = got.clone()
        csg_ext.project_gate_(fixed, method)  # a projection leaves feasible points where they are
        assert torch.equal(fixed.nan_to_num(5), got.nan_to_num(5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cpu_variant(cpu_level, dtype):
    for shape, method in itertools.product(SHAPES, METHODS):
        gate, grad = gates(shape, dtype), torch.randn(*shape).to(dtype)
        assert_close(csg_ext.project_gate(gate, method), reference.project_gate(gate.double(), method), dtype)
        top, where = torch.ops.csg_ext.column_max(gate)
        want_top, want_where = gate.max(0)
        assert torch.equal(top.nan_to_num(9), want_top.nan_to_num(9))
        assert torch.equal(where, want_where)
        step_and_compare(gate, grad, method, dict(lr=0.3, momentum=0.9, weight_decay=0.01), dtype)


def step_and_compare(gate, grad, method, options, dtype):
    """Update and projection in the accumulator, rounded once to the dtype."""
    use_buffer = options.get("momentum", 0) != 0
    buffer = torch.randn_like(gate) if use_buffer else None
    new_gate, new_buffer = gate.clone(), None if buffer is None else buffer.clone()
    csg_ext.gate_step_(new_gate, grad, new_buffer, method=method, **options)
    acc = accumulator(dtype)
    d = grad.to(acc) + options.get("weight_decay", 0.0) * gate.to(acc)
    if buffer is not None:
        kept = d if options.get("first_step") else (
            options["momentum"] * buffer.to(acc) + (1 - options.get("dampening", 0.0)) * d
        )  # fmt: skip
        assert_close(new_buffer, kept, dtype)
        d = d + options["momentum"] * kept if options.get("nesterov") else kept
    updated = gate.to(acc) - options["lr"] * d
    assert in_feasible_set(new_gate)
    want = reference.project_gate(updated.double(), method)
    # One rounding to the dtype, and the accumulator's in the update, relative to the column's largest magnitude over
    # its maximum. Where two entries are closer than that, or the column is nearly dead, either may be the largest.
    eps, acc_eps = torch.finfo(dtype).eps, torch.finfo(acc).eps
    top = updated.double().max(0).values
    second = updated.double().topk(min(2, len(gate)), 0).values[-1] if len(gate) > 1 else top - 1
    scale = updated.double().abs().amax(0) / top.abs().clamp_min(0.05)
    clear = (top.abs() > 0.05) & ((top - second) > 16 * acc_eps * scale) & ~top.isnan()
    bound = eps * want + 16 * acc_eps * (1 + scale)
    assert ((new_gate.double() - want).abs() <= bound)[:, clear].all()
    assert torch.equal(new_gate.isnan(), want.isnan())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_matches_the_definition(device, dtype, method):
    options = [
        dict(lr=0.1),
        dict(lr=0.1, weight_decay=0.1),
        dict(lr=0.1, momentum=0.9),
        dict(lr=0.1, momentum=0.9, first_step=True),
        dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.05),
        dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
        dict(lr=0.0),
    ]
    for shape, option in itertools.product(SHAPES, options):
        gate = reference.project_gate(torch.rand(*shape, device=device, dtype=torch.float64)).to(dtype)
        grad = torch.randn(*shape, device=device).to(dtype)
        step_and_compare(gate, grad, method, option, dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_equal_maxima_gets_the_one_wherever_rows_are_split(device, dtype, method):
    rows, columns = 600, 210
    gate = -torch.rand(rows, columns, device=device) - 0.5
    first = torch.randint(rows, (columns,))
    for k, c in enumerate(first.tolist()):  # one to three equal entries, the largest of a column without a positive one
        gate[torch.tensor([c, *torch.randint(c, rows, (2,)).tolist()]), k] = -0.25
    gate[first[0], 0] = float("nan")
    gate[:, 1] = 0.0
    first[1] = 0
    want = torch.zeros(rows, columns).scatter(0, first[None], 1.0)
    want[:, 0] = float("nan")
    got = csg_ext.project_gate(gate.to(dtype), method).float().cpu()
    assert torch.equal(got.nan_to_num(9), want.nan_to_num(9))


def test_same_bits_for_any_number_of_threads():
    gate, grad, buffer = torch.rand(200, 4096), torch.randn(200, 4096), torch.randn(200, 4096)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            g, b = gate.clone(), buffer.clone()
            csg_ext.gate_step_(g, grad, b, lr=0.1, momentum=0.9)
            results.append((g, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_projection_is_differentiable(device, method):
    gate = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    with torch.no_grad():
        gate[:, 2] = -gate[:, 2].abs() - 0.1
    assert gradcheck(lambda g: csg_ext.project_gate(g, method), (gate,))
    assert gradgradcheck(lambda g: csg_ext.project_gate(g, method), (gate,))


def test_strided_gates_and_empty_ones(device):
    big = torch.randn(12, 80, device=device)
    view = big[1:11, ::2]
    want = reference.project_gate(view.double())
    outside = big[:, 1::2].clone()
    csg_ext.project_gate_(view)
    assert_close(view, want, torch.float32)
    assert torch.equal(big[:, 1::2], outside)
    buffer = torch.zeros(40, 10, device=device).t()
    csg_ext.gate_step_(view, torch.randn(10, 40, device=device), buffer, lr=0.1, momentum=0.9)
    assert buffer.abs().sum() > 0
    for shape in [(0, 4), (4, 0), (0, 0)]:
        gate = torch.zeros(shape, device=device)
        assert csg_ext.project_gate(gate).shape == shape
        csg_ext.gate_step_(gate, gate.clone(), lr=0.1)


def test_a_graph_notices_the_step(device):
    gate = torch.rand(3, 4, device=device, requires_grad=True)
    loss = csg_ext.gated_pool(torch.randn(2, 4, 3, 3, device=device, requires_grad=True), gate,
                              torch.tensor([0, 1], device=device)).sum()  # fmt: skip
    csg_ext.project_gate_(gate)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_views_of_negated_memory(device):
    """Such as x.conj().imag, whose sign is changed when it is read."""
    gate, grad, buffer = (torch.randn(5, 7, device=device) for _ in range(3))
    negated = [torch._neg_view(-t) for t in (gate, grad, buffer)]
    csg_ext.gate_step_(gate, grad, buffer, lr=0.1, momentum=0.9)
    csg_ext.gate_step_(*negated, lr=0.1, momentum=0.9)
    assert torch.equal(negated[0], gate) and torch.equal(negated[2], buffer)
    assert torch.equal(csg_ext.project_gate_(torch._neg_view(-grad)), csg_ext.project_gate(grad))


@pytest.mark.parametrize("how", ["operator", "eager", "aot_eager", "export"])
def test_a_graph_notices_the_step_of_a_graph_of_operators(device, how):
    weight = torch.rand(3, 4, device=device, requires_grad=True)
    gate, grad, buffer = weight.detach(), torch.rand(3, 4, device=device), torch.zeros(3, 4, device=device)

    def step(gate, grad, buffer):
        csg_ext.gate_step_(gate, grad, buffer, lr=0.1, momentum=0.9)
        return gate + 1

    if how == "operator":
        step = torch.ops.csg_ext.gate_step_
        call = functools.partial(step, gate, grad, buffer, 0.1, 0.9, 0.0, 0.0, False, False, False)
    elif how == "export":
        module = torch.nn.Module()
        module.forward = step
        call = functools.partial(torch.export.export(module, (gate, grad, buffer)).module(), gate, grad, buffer)
    else:
        torch._dynamo.reset()
        call = functools.partial(torch.compile(step, backend=how, fullgraph=True), gate, grad, buffer)
    loss, version = weight.square().sum(), buffer._version
    call()
    assert buffer._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck_and_compile(device):
    ops = torch.ops.csg_ext
    gate, grad, buffer = (torch.rand(5, 7, device=device) for _ in range(3))
    for euclidean in (False, True):
        args = (gate.clone(), grad, buffer.clone(), 0.1, 0.9, 0.0, 0.01, True, False, euclidean)
        torch.library.opcheck(ops.gate_step_.default, args)
        torch.library.opcheck(
            ops.gate_step_.default, (gate.clone(), None, None, 0.0, 0.0, 0.0, 0.0, False, False, euclidean)
        )
    torch.library.opcheck(ops.column_max.default, (gate,))
    torch._dynamo.reset()

    def step(gate, grad, buffer):
        csg_ext.gate_step_(gate, grad, buffer, lr=0.1, momentum=0.9)
        return gate * 2

    compiled = torch.compile(step, fullgraph=True)
    a, b = (gate.clone(), buffer.clone()), (gate.clone(), buffer.clone())
    torch.testing.assert_close(compiled(a[0], grad, a[1]), step(b[0], grad, b[1]))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
def test_projected_sgd_is_sgd_then_projection(device, options):
    gate = torch.full((6, 20), 0.5, device=device, requires_grad=True)
    other = gate.detach().clone().requires_grad_()
    ours, theirs = ProjectedSGD([gate], lr=0.2, **options), torch.optim.SGD([other], lr=0.2, **options)
    for _ in range(6):
        grad = torch.randn(6, 20, device=device)
        gate.grad, other.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
        with torch.no_grad():
            other.copy_(reference.project_gate(other))
        torch.testing.assert_close(gate, other, rtol=1e-5, atol=1e-6)
        assert in_feasible_set(gate.detach())


@pytest.mark.parametrize("compiled", [False, True])
def test_projected_sgd_takes_its_rate_from_a_tensor_that_changes(device, compiled):
    gates = [torch.full((3, 4), 0.5, device=device, requires_grad=True) for _ in range(2)]
    ours, other = (
        ProjectedSGD([g], lr=lr, momentum=0.9) for g, lr in zip(gates, (torch.tensor(1.0), 1.0), strict=True)
    )
    torch._dynamo.reset()
    step = torch.compile(ours.step, backend="eager") if compiled else ours.step
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (ours, other)]
    for _ in range(3):
        for gate in gates:
            gate.grad = torch.arange(12.0, device=device).view(3, 4).sin()
        step()
        other.step()
        assert torch.equal(*gates)
        for schedule in schedules:
            schedule.step()
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor)


def test_projected_sgd_resumes(device):
    def run(steps, state=None):
        torch.manual_seed(3)
        gate = torch.full((4, 9), 0.5, device=device, requires_grad=True)
        optimizer = ProjectedSGD([gate], lr=0.1, momentum=0.9)
        grads = torch.randn(6, 4, 9, device=device)
        start = 0
        if state is not None:
            start = 3
            with torch.no_grad():
                gate.copy_(state[0])
            optimizer.load_state_dict(state[1])
        for i in range(start, steps):
            gate.grad = grads[i]
            optimizer.step()
        return gate.detach().clone(), optimizer.state_dict()

    assert torch.equal(run(6)[0], run(6, run(3))[0])


def test_projected_adam_with_a_scheduler(device):
    linear, gate = torch.nn.Linear(20, 3).to(device), torch.nn.Parameter(torch.full((3, 20), 0.5, device=device))
    adam = torch.optim.Adam([{"params": linear.parameters()}, {"params": [gate], "lr": 0.1}], lr=1e-3)
    optimizer = ProjectedOptimizer(adam, [gate])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    x, labels = torch.randn(8, 20, 3, 3, device=device), torch.randint(0, 3, (8,), device=device)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(csg_ext.gated_pool(x, gate, labels)), labels).backward()
        optimizer.step()
        scheduler.step()
        assert in_feasible_set(gate.detach())
    assert adam.param_groups[1]["lr"] == pytest.approx(0.0125)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups is adam.param_groups
    extra = torch.nn.Parameter(torch.zeros(2, device=device))
    optimizer.add_param_group({"params": [extra]})
    assert len(adam.param_groups) == len(optimizer.param_groups) == 3


def test_the_state_of_plain_sgd_goes_on_projected():
    gates = [torch.nn.Parameter(torch.rand(3, 4)) for _ in range(2)]
    gates[1].data.copy_(gates[0].data)
    plain, ours = torch.optim.SGD(gates[:1], lr=0.1, momentum=0.9), ProjectedSGD(gates[1:], lr=0.5)
    gates[0].grad = torch.randn(3, 4)
    plain.step()
    gates[1].data.copy_(gates[0].data)
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    for gate in gates:
        gate.grad = torch.ones(3, 4)
    plain.step()
    ours.step()
    torch.testing.assert_close(gates[1].detach(), csg_ext.project_gate(gates[0].detach()))


@pytest.mark.parametrize("loader", ["wrapped", "wrapper"])
def test_a_projected_optimizer_and_its_own_stay_one_after_either_loads_a_state(loader):
    gate = torch.nn.Parameter(torch.rand(3, 4))
    adam = torch.optim.Adam([gate], lr=0.1)
    optimizer = ProjectedOptimizer(adam, [gate])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for load in (False, True, False):
        if load:
            (adam if loader == "wrapped" else optimizer).load_state_dict(copy.deepcopy(adam.state_dict()))
        gate.grad = torch.randn(3, 4)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups is adam.param_groups and optimizer.state is adam.state and len(adam.state) == 1
    assert adam.param_groups[0]["lr"] == pytest.approx(0.0125)


def test_hooks_of_a_projected_optimizer_and_its_own_are_each_called_once():
    gate = torch.nn.Parameter(torch.rand(3, 4))
    gate.grad = torch.randn(3, 4)
    optimizer = ProjectedOptimizer(torch.optim.Adam([gate], lr=0.1), [gate])
    called = []

    def note(name, owner, *args):
        called.append(name)
        assert args[0] is owner

    owners = {"outer": optimizer, "inner": optimizer.optimizer}
    kinds = [
        "step_pre",
        "step_post",
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    ]
    for (name, owner), kind in itertools.product(owners.items(), kinds):
        hook = functools.partial(note, f"{name} {kind}", owner)
        getattr(owner, f"register_{kind}_hook")(hook)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for kind in ("step", "state_dict", "load_state_dict"):
        order = ["outer {}_pre", "inner {}_pre", "inner {}_post", "outer {}_post"]
        assert [name for name in called if f" {kind}_" in name] == [name.format(kind) for name in order]
    assert len(called) == 12


def test_hooks_of_a_projected_optimizer_may_change_the_state():
    gate = torch.nn.Parameter(torch.rand(3, 4))
    optimizer = ProjectedOptimizer(torch.optim.SGD([gate], lr=0.1), [gate])
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "epoch": 7})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "param_groups": state.pop("groups")})
    state = optimizer.state_dict()
    assert state["epoch"] == 7
    state["groups"] = [{**state.pop("param_groups")[0], "lr": 0.5}]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5 and "groups" in state  # the caller's dict stays as it is


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_of_a_projected_optimizer_steps_its_own_parameters(duplicate):
    gate = torch.nn.Parameter(torch.rand(3, 4))
    optimizer = ProjectedOptimizer(torch.optim.Adam([gate], lr=0.1), [gate], "euclidean")
    gate.grad = torch.randn(3, 4)
    optimizer.step()
    other = duplicate(optimizer)
    (twin,) = other.param_groups[0]["params"]
    assert twin is other.gates[0] is not gate and other.method == "euclidean"
    for parameter, by in ((gate, optimizer), (twin, other)):
        parameter.grad = torch.ones(3, 4)
        by.step()
    assert torch.equal(gate, twin) and in_feasible_set(gate.detach())


def test_an_unconstrained_gate_needs_no_projection(device):
    """project=True: plain SGD on any gate gives the loss of the projected one, and decreases it."""
    gate = torch.nn.Parameter(torch.randn(4, 12, device=device))
    x, labels = torch.rand(32, 12, 3, 3, device=device), torch.arange(32, device=device) % 4
    classifier = torch.randn(12, 4, device=device)
    optimizer = torch.optim.SGD([gate], lr=0.5)
    losses = []
    for _ in range(30):
        out = csg_ext.gated_pool(x, gate, labels, project=True)
        same = csg_ext.gated_pool(x, csg_ext.project_gate(gate.detach()), labels)
        torch.testing.assert_close(out.detach(), same)
        loss = torch.nn.functional.cross_entropy(out @ classifier, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def matrix(rows=3, columns=4, dtype=torch.float32):
    return torch.rand(rows, columns).to(dtype)


def sgd(gate, **options):
    return ProjectedSGD([gate.requires_grad_()], **options)


def group(**options: object) -> None:
    """A group that is added later, with options of its own."""
    optimizer = sgd(matrix())
    try:
        optimizer.add_param_group({"params": [matrix()], "name": "second"} | options)
    finally:
        assert len(optimizer.param_groups) == 1  # what is refused leaves nothing behind


def stranger():
    return ProjectedOptimizer(torch.optim.SGD([matrix().requires_grad_()], lr=1), [matrix()])


@pytest.mark.parametrize("strides", [(1, 1), (0, 1), (2, 1)])
def test_a_gate_that_overlaps_itself_is_refused(strides):
    gate = torch.rand(30).as_strided((3, 4), strides)
    with pytest.raises(ValueError, match="project_gate_: gate is updated in place and must not be expanded or overlap"):
        csg_ext.project_gate_(gate)


def test_results_of_a_graph_and_inference_tensors_are_refused_where_pytorch_could_not_follow():
    """Leaves, and what is done under no_grad or inference_mode, go on as with PyTorch's own operators in place."""
    leaf = torch.rand(3, 4, requires_grad=True)
    result = leaf * 1
    with torch.inference_mode():
        inferred = torch.rand(3, 4)
    calls = {
        "project_gate_: gate": csg_ext.project_gate_,
        "gate_step_: gate": lambda t: csg_ext.gate_step_(t, matrix(), lr=0.1),
        "gate_step_: momentum_buffer": lambda t: csg_ext.gate_step_(matrix(), matrix(), t, lr=0.1, momentum=0.9),
    }
    for name, call in calls.items():
        for tensor in (result, leaf[:, :4]):
            with pytest.raises(ValueError, match=rf"^{name} is updated outside autograd and must be a leaf [^\n]*$"):
                call(tensor)
        for tensor in (inferred, inferred[:, ::2]):
            with pytest.raises(ValueError, match=rf"^{name} must be a normal tensor [^\n]*, got an inference tensor"):
                call(tensor)
        call(leaf)
        call(matrix().requires_grad_().detach())
        with torch.no_grad():
            call(leaf[:, :4])
        with torch.inference_mode():
            call(inferred)
    torch._dynamo.reset()
    torch.compile(csg_ext.project_gate_, backend="eager", fullgraph=True)(leaf)
    assert in_feasible_set(leaf.detach()) and in_feasible_set(csg_ext.project_gate(inferred))


@pytest.mark.parametrize("method", METHODS)
def test_projection_under_transforms(method):
    several = torch.randn(5, 4, 3, dtype=torch.float64)

    def ours(gate):
        return csg_ext.project_gate(gate, method)

    torch.testing.assert_close(torch.vmap(ours)(several), torch.stack([ours(gate) for gate in several]))
    got = torch.func.jacfwd(ours)(several[0])
    torch.testing.assert_close(got, torch.func.jacrev(lambda gate: reference.project_gate(gate, method))(several[0]))
    assert got.any()
    with forward_ad.dual_level(), pytest.raises(ValueError, match="project_gate_: gate .* no forward-mode tangent"):
        csg_ext.project_gate_(forward_ad.make_dual(several[0], several[1]), method)


def step(*args, **options):
    return csg_ext.gate_step_(matrix(), *args, **{"lr": 0.1, **options})


INT, DOUBLE = torch.int64, torch.float64
BAD = [
    (lambda: csg_ext.project_gate(matrix()[0]), ValueError, r"project_gate: gate must have .* \(C, K\), got \(4,\)"),
    (lambda: csg_ext.project_gate_(matrix(), "l2"), ValueError, r"project_gate_: method must be .*, got 'l2'"),
    (lambda: csg_ext.project_gate_(matrix(dtype=INT)), TypeError, r"project_gate_: gate must be .*, got torch.int64"),
    (lambda: csg_ext.project_gate([1.0]), TypeError, r"project_gate: gate must be a torch.Tensor, got list"),
    (lambda: step(matrix(4)), ValueError, r"gate_step_: grad must have the shape of gate, \(3, 4\), got \(4, 4\)"),
    (lambda: step(matrix(dtype=DOUBLE)), TypeError, r"gate_step_: grad must .* of gate, float32, got float64"),
    (lambda: step(None), TypeError, r"gate_step_: grad must be a torch.Tensor, got NoneType"),
    (lambda: step(matrix(), lr=-1.0), ValueError, r"gate_step_: lr must be >= 0, got -1.0"),
    (lambda: step(matrix(), momentum=0.9), ValueError, r"gate_step_: momentum = 0.9 needs a momentum_buffer"),
    (lambda: step(matrix(), matrix(2), momentum=0.9), ValueError, r"gate_step_: momentum_buffer must have the shape"),
    (lambda: step(matrix(), matrix(), nesterov=True), ValueError, r"gate_step_: nesterov needs momentum > 0"),
    (lambda: csg_ext.project_gate_(matrix()[:1].expand(3, -1)), ValueError, r"project_gate_: gate is updated in place"),
    (
        lambda: step(matrix(), matrix()[:1].expand(3, -1)),
        ValueError,
        r"gate_step_: momentum_buffer is updated",
    ),
    (lambda: step(matrix(), [0.0]), TypeError, r"gate_step_: momentum_buffer must be a torch.Tensor, got list"),
    (lambda: step(matrix(), lr="0.1"), TypeError, r"gate_step_: lr must be a number, got '0.1'"),
    (lambda: step(matrix(), dampening=None), TypeError, r"gate_step_: dampening must be a number, got None"),
    (lambda: step(matrix(), dampening=float("nan")), ValueError, r"gate_step_: dampening must be a number, got nan"),
    (lambda: step(matrix().to_sparse()), TypeError, r"gate_step_: grad must be a dense tensor, got layout"),
    (lambda: csg_ext.project_gate(matrix().to_sparse()), TypeError, r"project_gate: gate must be a dense tensor"),
    (lambda: csg_ext.project_gate(matrix(), ["scale"]), ValueError, r"project_gate: method must be 'scale' or"),
    (lambda: csg_ext.gate_penalty([[1.0]]), TypeError, r"gate_penalty: gate must be a torch.Tensor, got list"),
    (lambda: csg_ext.gate_penalty(matrix(), "4"), TypeError, r"gate_penalty: budget must be a number, got '4'"),
    (lambda: sgd(matrix()[0]), ValueError, r"ProjectedSGD: every parameter must be a gate \(C, K\), got \(4,\)"),
    (lambda: sgd(matrix(), lr="0.1"), TypeError, r"ProjectedSGD: lr must be a number, got '0.1'"),
    (lambda: sgd(matrix(), lr=torch.ones(2)), TypeError, r"ProjectedSGD: lr must be a number, got tensor"),
    (lambda: sgd(matrix(), lr=-1), ValueError, r"ProjectedSGD: lr must be >= 0, got -1"),
    (lambda: group(lr=-1), ValueError, r"ProjectedSGD: lr must be >= 0, got -1"),
    (lambda: group(nesterov=True), ValueError, r"ProjectedSGD: nesterov needs momentum > 0 and dampening = 0, got"),
    (lambda: group(maximize=True), ValueError, r"ProjectedSGD: maximize must be left out"),
    (lambda: group(params=[matrix()[0]]), ValueError, r"ProjectedSGD: every parameter must be a gate \(C, K\), got"),
    (stranger, ValueError, r"ProjectedOptimizer: gates\[0\] must be a parameter"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_one_clear_sentence(call, error, message):
    with pytest.raises(error, match=rf"^{message}[^\n]*$"):
        call()


@pytest.mark.parametrize("name", ["gate", "momentum_buffer"])
def test_the_operator_refuses_other_strides_with_and_without_values(name):
    tensors = {"gate": matrix(), "grad": matrix(), "momentum_buffer": matrix()} | {name: matrix(4, 3).T}
    for device in ("cpu", "meta"):
        moved = [t.to(device) for t in tensors.values()]
        with pytest.raises(RuntimeError, match=rf"^gate_step_: {name} must be contiguous, got other strides$"):
            torch.ops.csg_ext.gate_step_(*moved, 0.1, 0.9, 0.0, 0.0, False, False, False)


@pytest.mark.parametrize(
    "gate, grad, error, message",
    [
        (matrix(), matrix(4), ValueError, r"grad must have the shape of gate, \(3, 4\), got \(4, 4\)"),
        (matrix(), matrix()[0], ValueError, r"grad must have the shape of gate, \(3, 4\), got \(4,\)"),
        (matrix(), matrix(dtype=DOUBLE), TypeError, "grad must have the dtype of gate, float32, got float64"),
        (matrix().to(torch.float8_e5m2), matrix(), TypeError, "gate must be float32, float64, float16 or bfloat16"),
    ],
)
def test_what_has_no_values_is_refused_with_the_same_sentences(gate, grad, error, message):
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^gate_step_: {message}[^\n]*$"):
            csg_ext.gate_step_(gate.to(device), grad.to(device), lr=0.1)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(csg_ext.gate_step_, backend="eager")(gate, grad, lr=0.1)
