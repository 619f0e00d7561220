"""MIS as a torchmetrics Metric: fed with batches, computed at the end, on one process or many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from csg_ext.metrics.mutual_information import mutual_information_score
from csg_ext.ops.mutual_info import _class_mutual_info


class MutualInformationScore(Metric):
    """MIS in nats: the mean over filters of the largest mutual information with a class, over all batches seen.

    ``update(features, labels)`` keeps a batch: features (B, K), floating point, and labels (B,), integers in [0, C).
    ``compute()`` returns the MIS, a float64 scalar; ``mi`` is then the matrix (K, C) that it was made of. Across
    processes, the batches of all are gathered, each process works on its share of the filters, and the shares are
    gathered: every process has the value that one process gives to the same samples in the order of the ranks. (With
    ties="noise" the order of samples matters as much as random_state does; with "exact" it does not.) A process may
    have no batch; features of other types or numbers of filters than in another process are a ValueError in all.

    Call ``update``, not ``forward``: the MI of a single batch means little. Memory: the features.
    Arguments and errors: as csg_ext.class_mutual_info, whose `device` is compute_device here and whose `progress` is
    left out, and those of torchmetrics.Metric.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    features: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        n_neighbors: int = 3,
        ties: str = "noise",
        random_state: int = 0,
        protocol: str = "one-vs-rest",
        normalize: bool = False,
        compute_device: torch.device | str | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {
            "num_classes": num_classes,
            "n_neighbors": n_neighbors,
            "ties": ties,
            "random_state": random_state,
            "protocol": protocol,
            "normalize": normalize,
            "device": compute_device,
            "chunk_size": chunk_size,
            "progress": None,
        }
        self._mi: Tensor | None = None
        self.add_state("features", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Keeps a batch: features (B, K), labels (B,)."""
        for name, value in (("features", features), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"MutualInformationScore: {name} must be a torch.Tensor, got {type(value).__name__}")
        if features.dim() != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                "MutualInformationScore: features and labels must be (B, K) and (B,), "
                f"got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        self.features.append(features.detach().clone())  # the caller may reuse its buffers
        # Of one type in all batches and ranks, which are gathered as they are.
        whole = not (labels.is_floating_point() or labels.is_complex())
        self.labels.append(labels.detach().to(torch.int64 if whole else labels.dtype, copy=True))

    def compute(self) -> Tensor:
        """The MIS of all batches, a scalar in nats."""
        features, labels = dim_zero_cat(self.features), dim_zero_cat(self.labels)
        if not self._is_synced:
            self._mi = self._rows(features, labels, 0, features.shape[1])
        else:  # every process holds all samples now
            group, filters = self.process_group, features.shape[1]
            world, rank = dist.get_world_size(group), dist.get_rank(group)
            size = -(-filters // world)
            begin = min(rank * size, filters)
            mine = self._rows(features, labels, begin, min(begin + size, filters))
            padded = mine.new_zeros((size, mine.shape[1]))
            padded[: len(mine)] = mine
            shares = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(shares, padded, group)
            self._mi = torch.cat(shares)[:filters]
        return torch.tensor(mutual_information_score(self._mi), dtype=torch.float64, device=features.device)

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        """Gathers the batches of all processes, as torchmetrics.Metric.sync, also where one has none."""
        available = distributed_available or self.distributed_available_fn
        if should_sync and not self._is_synced and callable(available) and available():
            self._agree(process_group or self.process_group)
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def _agree(self, group: Any) -> None:
        """Batches are gathered as bytes: a process without any gets an empty one of the others' type and width."""
        mine = {(batch.shape[1], batch.dtype) for batch in self.features}
        ranks: list[set[tuple[int, torch.dtype]]] = [set()] * dist.get_world_size(group)
        dist.all_gather_object(ranks, mine, group)
        kinds = set.union(*ranks)
        if len(kinds) > 1:
            raise ValueError(
                "MutualInformationScore: features of all batches and processes must have one dtype and number of "
                f"filters, got {' and '.join(sorted(f'{dtype} with {width}' for width, dtype in kinds))}"
            )
        for width, dtype in kinds - mine:
            self.features.append(torch.empty((0, width), dtype=dtype, device=self.device))
            self.labels.append(torch.empty(0, dtype=torch.int64, device=self.device))

    def set_dtype(self, dst_type: str | torch.dtype) -> MutualInformationScore:
        """Converts the kept features, as torchmetrics.Metric.set_dtype; labels stay integers."""
        kept = list(self.labels)
        super().set_dtype(dst_type)
        self.labels = kept
        return self

    def _rows(self, features: Tensor, labels: Tensor, begin: int, end: int) -> Tensor:
        mi = _class_mutual_info(features, labels, begin, end, **self.options)
        assert isinstance(mi, Tensor)
        return mi

    @property
    def mi(self) -> Tensor:
        """The matrix (K, C) in nats of the last compute()."""
        if self._mi is None:
            raise RuntimeError("MutualInformationScore: mi is there after compute(), which was not called")
        return self._mi

    def reset(self) -> None:
        """Forgets all batches and the matrix."""
        super().reset()
        self._mi = None
