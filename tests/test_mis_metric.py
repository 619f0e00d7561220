"""Tests of the torchmetrics Metric: batches, options, and two processes that share the filters."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import csg_ext
from csg_ext.metrics import MutualInformationScore
from csg_ext.metrics import metric as metric_module

CASES = [{}, {"ties": "exact", "n_neighbors": 5}, {"protocol": "balanced", "normalize": True, "random_state": 4}]


def sample(n=240, k=7, c=4):
    torch.manual_seed(0)
    y = torch.randint(0, c, (n,))
    return (torch.randn(n, k) + 2 * (torch.arange(k) == y[:, None])).relu(), y


@pytest.mark.parametrize("options", CASES)
def test_batches_give_the_value_of_the_whole(options, device):
    x, y = (t.to(device) for t in sample())
    metric = MutualInformationScore(5, **options).to(device)
    with pytest.raises(RuntimeError, match="MutualInformationScore: mi is there after compute"):
        metric.mi  # noqa: B018
    for begin in range(0, 240, 50):
        metric.update(x[begin : begin + 50].requires_grad_(), y[begin : begin + 50])
    mi = csg_ext.class_mutual_info(x, y, num_classes=5, **options)
    score = metric.compute()
    assert score.shape == () and score.dtype == torch.float64 and score.device.type == device
    assert score.item() == csg_ext.mutual_information_score(mi) and torch.equal(metric.mi, mi)
    metric.reset()
    metric.update(x[:100], y[:100])
    assert metric.compute().item() == csg_ext.mutual_information_score(
        csg_ext.class_mutual_info(x[:100], y[:100], num_classes=5, **options)
    )


def test_buffers_that_the_caller_uses_again():
    x, y = sample()
    metric, features, labels = MutualInformationScore(), torch.empty(60, 7), torch.empty(60, dtype=torch.int64)
    for begin in range(0, 240, 60):
        metric.update(features.copy_(x[begin : begin + 60]), labels.copy_(y[begin : begin + 60]))
    assert metric.compute().item() == csg_ext.mutual_information_score(csg_ext.class_mutual_info(x, y))


def test_labels_of_other_integers():
    """Ranks gather labels as they are: of two types, bytes of one would be read as the other."""
    x, y = sample()
    metric = MutualInformationScore()
    for part, dtype in zip(range(0, 240, 60), (torch.int32, torch.uint8, torch.int64, torch.int16), strict=True):
        metric.update(x[part : part + 60], y[part : part + 60].to(dtype))
    assert all(labels.dtype == torch.int64 for labels in metric.labels)
    assert metric.compute().item() == csg_ext.mutual_information_score(csg_ext.class_mutual_info(x, y))


def test_batches_that_do_not_fit():
    metric = MutualInformationScore()
    with pytest.raises(ValueError, match=r"must be \(B, K\) and \(B,\), got \(3, 2\) and \(4,\)"):
        metric.update(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"MutualInformationScore: labels must be a torch.Tensor, got list"):
        metric.update(torch.zeros(3, 2), [0, 1, 0])
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        csg_ext.metrics.Nothing  # noqa: B018


def test_another_dtype_of_the_features_leaves_the_labels():
    x, y = sample()
    metric = MutualInformationScore()
    metric.update(x, y)
    assert metric.set_dtype(torch.float64) is metric and metric.features[0].dtype == torch.float64
    assert metric.compute().item() == csg_ext.mutual_information_score(csg_ext.class_mutual_info(x.double(), y))


FILTERS = [7, 1]  # one of two processes has none of a single filter


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    half = slice(0, 100) if rank == 0 else slice(100, 240)
    results, shares, work = [], [], metric_module._class_mutual_info

    def recorded(features, labels, begin, end, **options):
        shares.append((begin, end))
        return work(features, labels, begin, end, **options)

    metric_module._class_mutual_info = recorded  # this process serves this test alone
    for filters in FILTERS:
        x, y = sample(k=filters)
        for options in CASES:
            metric = MutualInformationScore(**options)
            for batch_x, batch_y in zip(x[half].split(30), y[half].split(30), strict=True):
                metric.update(batch_x, batch_y)
            results.append((metric.compute(), metric.mi))
    x, y = sample()
    metric = MutualInformationScore()
    if rank == 1:  # the other one has no batch
        metric.update(x, y)
    results.append((metric.compute(), metric.mi))
    metric.update(x[:30], y[:30])
    results.append((metric.compute(), metric.mi))
    metric.update(x[half], y[half]) if rank == 1 else metric.update(x[half].double(), y[half])
    with pytest.raises(ValueError, match="one dtype and number of filters, got torch.float32 with 7 and torch.float64"):
        metric.compute()
    torch.save((results, shares), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_value_of_one(tmp_path):
    mp.start_processes(_process, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    for rank in range(2):
        found, shares = torch.load(tmp_path / f"{rank}.pt")
        results = iter(found)
        seven, one = ((0, 4), (0, 1)) if rank == 0 else ((4, 7), (1, 1))  # the filters that this rank works on
        assert shares == [seven] * len(CASES) + [one] * len(CASES) + [seven] * 2
        for filters in FILTERS:
            x, y = sample(k=filters)
            for options in CASES:
                score, mi = next(results)
                want = csg_ext.class_mutual_info(x, y, **options)
                assert torch.equal(mi, want) and score.item() == csg_ext.mutual_information_score(want)
        x, y = sample()
        later = torch.cat((x[:30], x, x[:30])), torch.cat((y[:30], y, y[:30]))
        for (score, mi), samples in zip(results, ((x, y), later), strict=True):
            want = csg_ext.class_mutual_info(*samples)
            assert torch.equal(mi, want) and score.item() == csg_ext.mutual_information_score(want)
