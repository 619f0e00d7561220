"""The class-specific gate as a module, its sparsity penalty, and a model that holds one before its classifier."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csg_ext.ops import gated_pool, project_gate_
from csg_ext.ops._errors import check_dense, real


def _check_gate(name: str, gate: Tensor) -> None:
    check_dense(name, "gate", gate)
    if gate.dim() != 2:
        raise ValueError(f"{name}: gate must be (C, K), got shape {tuple(gate.shape)}")
    if not gate.is_floating_point():
        raise TypeError(f"{name}: gate must have a floating dtype, got {gate.dtype}")


def _l1_norm(gate: Tensor) -> Tensor:
    """||G||_1, of half dtypes in float32: 65504, the largest number of float16, is soon reached."""
    return gate.abs().sum(dtype=torch.promote_types(gate.dtype, torch.float32))


def gate_penalty(gate: Tensor, budget: float | None = None, norm: str = "l1") -> Tensor:
    """Sparsity penalty d(||G||_1, g) = psi(ReLU(||G||_1 - g)) of a gate (C, K); a scalar, float32 for half gates.

    budget g is in units of ||G||_1; None means K, the smallest norm that a feasible gate can have (every column has an
    entry of 1). psi is "l1" (the identity), "l2" (the square) or "smooth_l1" (0.5 d^2 below 1, d - 0.5 above).
    Raises ValueError for another shape, TypeError for a gate that is not floating or a budget that is no number.
    Source: Liang et al., ECCV 2020, section 3.3.

    Example:
        >>> gate_penalty(torch.eye(4)), gate_penalty(torch.ones(4, 4)), gate_penalty(torch.ones(4, 4), budget=10)
        (tensor(0.), tensor(12.), tensor(6.))
    """
    _check_gate("gate_penalty", gate)
    if budget is not None:
        budget = real("gate_penalty", "budget", budget)
    excess = F.relu(_l1_norm(gate) - (gate.shape[1] if budget is None else budget))
    if norm == "l1":
        return excess
    if norm == "l2":
        return excess.square()
    if norm == "smooth_l1":
        return F.smooth_l1_loss(excess, torch.zeros_like(excess))
    raise ValueError(f"gate_penalty: norm must be 'l1', 'l2' or 'smooth_l1', got {norm!r}")


def l1_density(gate: Tensor) -> Tensor:
    """L1-density ||G||_1 / (K C) of a gate (C, K): between 1/C (every filter has one class) and 1; a scalar, float32
    for half gates.

    Raises ValueError for another shape or an empty gate, TypeError for one that is not floating.

    Example:
        >>> l1_density(torch.eye(4)), l1_density(torch.ones(4, 8))
        (tensor(0.2500), tensor(1.))
    """
    _check_gate("l1_density", gate)
    if gate.numel() == 0:
        raise ValueError(f"l1_density: gate must have an entry, got shape {tuple(gate.shape)}")
    return _l1_norm(gate) / gate.numel()


def resolve_path(name: str, labels: Tensor | None, path: str | None) -> str:
    """The path to take, one of "std", "csg" and "both"; None means "std" without labels and "csg" with labels.

    `name` stands at the beginning of the errors.
    """
    if path not in (None, "std", "csg", "both"):
        raise ValueError(f"{name}: path must be 'std', 'csg', 'both' or None, got {path!r}")
    if labels is None and path in ("csg", "both"):
        raise ValueError(f"{name}: labels must be given for path={path!r}, got None")
    return path or ("std" if labels is None else "csg")


def _pool(x: Tensor) -> Tensor:
    """The global average pool, (N, K), of x (N, K, *spatial)."""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


class ClassSpecificGate(nn.Module):
    """A learnable gate G (C, K) on the globally pooled features of a layer with K filters.

    The parameter `gate` starts at `init` everywhere, which is outside V_G (no column reaches 1) on purpose: the first
    projection follows the first gradients. Call `project_()` after every update by an optimizer that does not project
    (`csg_ext.optim.ProjectedSGD` does).

    Arguments: num_classes is C, num_filters K; device and dtype are the gate's, as for PyTorch's modules.
    Raises ValueError where a size is below 1 or init is not finite, TypeError for
    a dtype that is not floating.
    Source: Liang et al., ECCV 2020, section 3.
    """

    def __init__(
        self,
        num_classes: int,
        num_filters: int,
        init: float = 0.5,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or num_filters < 1:
            raise ValueError(
                "ClassSpecificGate: num_classes and num_filters must be at least 1, "
                f"got {num_classes} and {num_filters}"
            )
        init = real("ClassSpecificGate", "init", init)
        if not math.isfinite(init):
            raise ValueError(f"ClassSpecificGate: init must be a finite number, got {init}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"ClassSpecificGate: dtype must be a floating dtype, got {dtype}")
        self.init = init
        self.gate = nn.Parameter(torch.empty((num_classes, num_filters), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the gate to `init` everywhere, as after `to_empty` of a module made on the meta device."""
        nn.init.constant_(self.gate, self.init)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.gate.shape[0]

    @property
    def num_filters(self) -> int:
        """K."""
        return self.gate.shape[1]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """G[labels] * avgpool(x): (N, K) from x (N, K, *spatial) and labels (N,), or float weights (N, C)."""
        return gated_pool(x, self.gate, labels)

    @torch.no_grad()
    def project_(self, method: str = "scale") -> ClassSpecificGate:
        """Projects the gate onto V_G in place and returns self; method: "scale" or "euclidean", see
        `csg_ext.project_gate`."""
        project_gate_(self.gate, method)
        return self

    def penalty(self, budget: float | None = None, norm: str = "l1") -> Tensor:
        """The sparsity penalty, a scalar; see `gate_penalty`."""
        return gate_penalty(self.gate, budget, norm)

    def density(self) -> float:
        """The L1-density as a float; see `l1_density`."""
        return float(l1_density(self.gate.detach()))

    def extra_repr(self) -> str:
        """What repr() shows."""
        shape = f"num_classes={self.num_classes}, num_filters={self.num_filters}"
        # On other devices the density would be waited for, or has no value.
        return f"{shape}, l1_density={self.density():.4f}" if self.gate.device.type == "cpu" else shape


class TwoPaths(nn.Module):
    """What every gated model has: the gate module `csg`, its parameter, and the other parameters."""

    csg: ClassSpecificGate

    @property
    def gate(self) -> nn.Parameter:
        """The gate's parameter, (C, K)."""
        return self.csg.gate

    def weights(self) -> list[nn.Parameter]:
        """Every parameter but the gate."""
        return [p for p in self.parameters() if p is not self.csg.gate]

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(pooled features (N, K), STD logits (N, C)), from one pass."""
        raise NotImplementedError


class GatedModel(TwoPaths):
    """A backbone, a class-specific gate and a linear classifier: the two forward paths of the method.

    - ``forward(x)``: STD path, classifier(avgpool(features)); evaluate with it (labels are unknown then);
    - ``forward(x, labels)``: CSG path, classifier(G[labels] * avgpool(features));
    - ``forward(x, labels, path="both")``: the logits of both, from one pass through backbone and pooling.

    Arguments: backbone maps x to a feature map (N, K, *spatial), or to pooled features (N, K); num_classes is C;
    num_filters is K, taken from `backbone.num_filters` when not given; init is the gate's first value; device and dtype
    are those of the gate and the classifier, as for PyTorch's modules. The state dict holds the gate, as "csg.gate",
    beside the weights.
    Raises ValueError where K is not known, for sizes below 1, a path that is none, and a CSG path without labels; what
    gated_pool raises for features or labels that do not fit.
    Source: Liang et al., ECCV 2020, figure 2.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_filters: int | None = None,
        init: float = 0.5,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_filters is None:
            found = getattr(backbone, "num_filters", None)
            if not isinstance(found, int):
                raise ValueError(
                    "GatedModel: num_filters must be given when the backbone has no attribute num_filters, "
                    f"got {type(backbone).__name__}"
                )
            num_filters = found
        self.backbone = backbone
        self.csg = ClassSpecificGate(num_classes, num_filters, init, device, dtype)
        self.classifier = nn.Linear(num_filters, num_classes, device=device, dtype=dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """The feature map of the last convolutional layer, (N, K, *spatial)."""
        return self.backbone(x)

    def pooled_features(self, x: Tensor) -> Tensor:
        """The ungated pooled features, (N, K): what mutual information is measured on."""
        return _pool(self.forward_features(x))

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(pooled features (N, K), STD logits (N, C)), from one pass."""
        pooled = self.pooled_features(x)
        return pooled, self.classifier(pooled)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, path: str | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (N, C) of one path, or of both: (STD logits, CSG logits).

        labels: int64 (N,), or float rows (N, C) (mixup, cutmix). path: "std", "csg" or "both"; None means "std"
        without labels and "csg" with labels.
        """
        path = resolve_path("GatedModel", labels, path)
        features = self.forward_features(x)
        if path == "std" or labels is None:
            return self.classifier(_pool(features))
        if path == "csg":
            return self.classifier(self.csg(features, labels))
        gated, pooled = gated_pool(features, self.gate, labels, return_pooled=True)
        return self.classifier(pooled), self.classifier(gated)
