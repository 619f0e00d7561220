"""The mutual-information operators on drawn inputs (tests/fuzzing.py), against scikit-learn and the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzzing import DTYPES, fuzz, matrices, sizes, strided
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_selection import mutual_info_classif as sklearn_mutual_info_classif
from test_mutual_info_approximate import definition

import csg_ext
from csg_ext import reference
from csg_ext.metrics import approximate_class_mutual_info
from csg_ext.ops import mutual_info


@st.composite
def problems(draw, **values):
    """(features (N, K), labels (N,) of at least two classes, C), with many equal values or few."""
    n, k, c = draw(sizes(2, 40)), draw(sizes(1, 5)), draw(sizes(2, 5))
    dtype, levels = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 2, 5, 1000]))
    features = draw(strided([n, k], dtype, finite=True, **values))
    if levels < 1000:
        features = (features.double() * levels).round().clamp(-1e4, 1e4).to(dtype)
    rest = draw(st.lists(sizes(0, c - 1), min_size=n - 2, max_size=n - 2))
    return features, torch.tensor([0, 1, *rest]), c


@fuzz
@given(st.data())
def test_exact_ties(data):
    features, labels, c = data.draw(problems())
    n, seed = len(labels), data.draw(st.sampled_from([0, 7, 2**32 - 1]))
    neighbors, balanced = data.draw(sizes(1, min(6, n - 1))), data.draw(st.booleans())
    options = {"num_classes": c, "random_state": seed, "protocol": "balanced" if balanced else "one-vs-rest"}
    got = csg_ext.class_mutual_info(features, labels, n_neighbors=neighbors, ties="exact", **options)
    if balanced:
        want = torch.zeros(features.shape[1], c, dtype=torch.float64)
        for number in range(c):
            members = np.flatnonzero(labels.numpy() == number)
            if min(len(members), n - len(members)) >= 2:
                rows, is_class = mutual_info._draw_balanced(members, n, (seed, number))
                taken = features[torch.from_numpy(rows)]
                for j, column in enumerate(taken.T):
                    want[j, number] = reference.mutual_info(column, torch.from_numpy(is_class), neighbors)
    else:
        want = reference.class_mutual_info(features, labels, c, neighbors)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    bound = csg_ext.class_entropy(labels, c, options["protocol"])
    normal = csg_ext.class_mutual_info(features, labels, n_neighbors=neighbors, ties="exact", normalize=True, **options)
    torch.testing.assert_close(normal * bound, torch.where(bound > 0, got, 0.0), rtol=0, atol=1e-12)


@fuzz
@given(st.data())
def test_noise_is_scikit_learns(data):
    features, labels, c = data.draw(problems(scaled=False))
    neighbors, seed = data.draw(sizes(1, min(6, len(labels) - 1))), data.draw(st.sampled_from([0, 7, 2**32 - 1]))
    got = csg_ext.class_mutual_info(features, labels, num_classes=c, n_neighbors=neighbors, random_state=seed)
    options = {"discrete_features": False, "n_neighbors": neighbors, "random_state": seed}
    x = features.double().numpy()
    if len(labels.unique()) < len(labels):  # scikit-learn refuses classes of one sample alone
        several = csg_ext.mutual_info_classif(features, labels, n_neighbors=neighbors, random_state=seed)
        np.testing.assert_allclose(
            several, sklearn_mutual_info_classif(x, labels.numpy(), **options), rtol=0, atol=1e-9
        )
    for number in range(c):
        target = (labels == number).numpy()
        if len(labels) > 2:
            want = sklearn_mutual_info_classif(x, target, **options)
            np.testing.assert_allclose(got[:, number], want, rtol=0, atol=1e-9)


@fuzz
@given(st.data())
def test_noise_of_any_magnitude(data):
    """A result, or the sentence about a variance that overflows."""
    features, labels, c = data.draw(problems())
    try:
        mi = csg_ext.class_mutual_info(features, labels, num_classes=c, n_neighbors=1)
        assert mi.shape == (features.shape[1], c) and bool((mi.isfinite() & (mi >= 0)).all())
    except ValueError as error:
        assert "finite variance" in str(error) and features.double().var(0).isinf().any()


@fuzz
@given(st.data())
def test_bins(data):
    features, labels, c = data.draw(problems())
    bins = data.draw(sizes(1, 60))
    got = approximate_class_mutual_info(features, labels, num_classes=c, bins=bins)
    want = definition(features.double().numpy(), labels.numpy(), c, min(bins, len(labels)))
    torch.testing.assert_close(got, torch.from_numpy(want), rtol=0, atol=1e-12)


@fuzz
@given(st.data())
def test_score_and_best_class(data):
    mi = data.draw(matrices([data.draw(sizes(1, 20)), data.draw(sizes(1, 6))], torch.float64, low=0.0, scaled=False))
    given = data.draw(st.sampled_from([mi, mi.numpy(), mi.tolist()]))
    want = torch.where(mi.isnan().any(1), torch.nan, mi.amax(1)).mean()
    score = torch.tensor(csg_ext.mutual_information_score(given), dtype=torch.float64)
    torch.testing.assert_close(score, want, rtol=1e-12, atol=0, equal_nan=True)
    best = torch.as_tensor(csg_ext.best_class(given))
    chosen = mi.gather(1, best[:, None])[:, 0]
    assert bool(((chosen == mi.amax(1)) | (chosen.isnan() & mi.isnan().any(1))).all())


if __name__ == "__main__":
    pytest.main([__file__])
