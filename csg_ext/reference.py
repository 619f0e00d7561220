"""The definition of every operator in plain PyTorch: slow, obvious, differentiable. The oracle of the tests.

Nothing here calls the extension, so these functions also document what the kernels compute.
Symbols: x feature map (N, K, *spatial), G gate (C, K), y labels (N,) or weights (N, C).
Source: Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating Class-specific
Filters", ECCV 2020, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clip(values: Tensor) -> Tensor:
    """Values clipped to [0, 1]; its gradient at both ends is 1; that of ``clamp`` depends on PyTorch's version."""
    return torch.where((values < 0) | (values > 1), values.detach().clamp(0, 1), values)


def project_gate(gate: Tensor, method: str = "scale") -> Tensor:
    """Projection onto V_G = {G in [0,1]^(C x K) : every column's maximum is 1}; differentiable.

    "scale": divide each column by the inf-norm of its positive part and clip to [0, 1].
    "euclidean": the nearest point of V_G: clip to [0, 1], then set the (first) largest entry to 1.
    A column without a positive entry becomes one-hot at its (first) largest entry; one with a NaN becomes NaN.
    """
    if gate.shape[0] == 0 or gate.shape[1] == 0:
        return gate.clone()
    top, where = gate.max(dim=0)  # NaN wins over every number
    one_hot = torch.zeros_like(gate).scatter(0, where[None], 1.0)
    if method == "scale":
        alive = top > 0
        projected = clip(gate / torch.where(alive, top, 1.0))
        projected = torch.where(alive, projected, one_hot)
    elif method == "euclidean":
        projected = torch.where(one_hot.bool(), torch.ones_like(gate), clip(gate))
    else:
        raise ValueError(f"project_gate: method must be 'scale' or 'euclidean', got {method!r}")
    return torch.where(torch.isnan(top), top, projected)


def gate_rows(gate: Tensor, labels: Tensor, project: bool = False) -> Tensor:
    """The gate's row of every sample, (N, K): gate[labels], or labels @ gate for float weights."""
    if project:
        gate = project_gate(gate)
    return labels.to(gate.dtype) @ gate if labels.is_floating_point() else gate[labels]


def gated_pool(
    x: Tensor,
    gate: Tensor,
    labels: Tensor,
    *,
    pool: str = "avg",
    return_pooled: bool = False,
    project: bool = False,
    channel_dim: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """row * pool(x), (N, K): the class-specific gate applied to a globally pooled feature map (the CSG path).

    The arguments are those of :func:`csg_ext.gated_pool`; with return_pooled also pool(x), (N, K).
    """
    x = x.movedim(channel_dim, 1).flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    x = x.to(torch.promote_types(x.dtype, gate.dtype))
    pooled = x.mean(2) if pool == "avg" else x.max(2).values
    out = gate_rows(gate, labels, project) * pooled
    return (out, pooled) if return_pooled else out


def gate_step(
    gate: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    first_step: bool = False,
    method: str = "scale",
) -> tuple[Tensor, Tensor | None]:
    """One step of torch.optim.SGD on the gate, then its projection; returns (gate, momentum_buffer).

    gate, grad, momentum_buffer: (C, K); the options are those of :func:`csg_ext.gate_step_`.
    """
    d = grad + weight_decay * gate if weight_decay else grad
    if momentum_buffer is not None:
        momentum_buffer = d if first_step else momentum * momentum_buffer + (1 - dampening) * d
        d = d + momentum * momentum_buffer if nesterov else momentum_buffer
    return project_gate(gate - lr * d, method), momentum_buffer


def mutual_info(x: Tensor, groups: Tensor, n_neighbors: int = 3) -> Tensor:
    """MI in nats of a continuous feature x (N,) with a label groups (N,), a scalar; ties counted exactly, O(N^2).

    The ball of a sample reaches to its k-th nearest neighbour in its own group (k at most the others there are) and is
    closed; k_i and m_i count the samples in it of its group and of all, itself left out. Groups of one sample take no
    part. MI = psi(N) - mean psi(n_group) + mean(psi(k_i) - psi(m_i)), at least 0.
    Source: Ross, doi:10.1371/journal.pone.0087357; closed balls as in Kraskov et al., doi:10.1103/PhysRevE.69.066138.
    """
    size = (groups[:, None] == groups).sum(1)
    x, groups, size = x.double()[size > 1], groups[size > 1], size[size > 1]
    if len(x) == 0:
        return torch.zeros((), dtype=torch.float64)
    distance = (x[:, None] - x).abs().fill_diagonal_(torch.inf)
    same = groups[:, None] == groups
    others = torch.where(same, distance, torch.inf).sort(1).values
    radius = others.gather(1, (size - 1).clamp(max=n_neighbors)[:, None] - 1)
    inside = distance <= radius
    k_i, m_i = (inside & same).sum(1), inside.sum(1)
    psi = torch.special.digamma
    mean = (psi(k_i.double()) - psi(m_i.double()) - psi(size.double())).mean()
    return (psi(torch.tensor(len(x), dtype=torch.float64)) + mean).clamp(min=0)


def class_mutual_info(features: Tensor, labels: Tensor, num_classes: int, n_neighbors: int = 3) -> Tensor:
    """M (K, C) in nats: mutual_info of each feature with every class against the rest; features (N, K), labels (N,)."""
    return torch.stack(
        [
            torch.stack([mutual_info(x, (labels == c).long(), n_neighbors) for c in range(num_classes)])
            for x in features.T
        ]
    )
