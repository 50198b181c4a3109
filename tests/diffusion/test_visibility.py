"""The dense mask equals the definition pair by pair, and FlexAttention computes the same attention."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from dlm_ray.diffusion.visibility import Visibility, annealed, documents_apart

LENGTH = 48
DOCUMENTS = torch.tensor([[0] * 20 + [1] * 28, [3] * 5 + [4] * 30 + [-1] * 13], dtype=torch.int32)


VISIBILITIES = [
    visibility
    for documents in (None, DOCUMENTS)
    for visibility in (
        Visibility("causal", document_ids=documents),
        Visibility("bidirectional", document_ids=documents),
        annealed("bernoulli", 0.4, 17, LENGTH, documents),
        annealed("window", 0.4, 17, LENGTH, documents),
    )
]


def by_definition(visibility, row, query, key):
    if visibility.document_ids is not None and visibility.document_ids[row, query] != visibility.document_ids[row, key]:
        return False
    if visibility.pattern == "bidirectional" or key <= query:
        return True
    if visibility.pattern == "window":
        return key - query <= round(0.4 * (LENGTH - 1))
    return None  # Bernoulli pairs in the future are a matter of chance


@pytest.mark.parametrize(
    "visibility", VISIBILITIES, ids=lambda v: f"{v.pattern}-{'documents' if v.document_ids is not None else 'plain'}"
)
def test_the_dense_mask_equals_the_definition(visibility):
    dense = visibility.dense(LENGTH, torch.device("cpu"))
    for row in range(dense.shape[0]):
        for query in range(LENGTH):
            for key in range(LENGTH):
                expected = by_definition(visibility, row, query, key)
                if visibility.pattern != "bernoulli" or expected is not None:
                    assert bool(dense[row, 0, query, key]) == bool(expected), (row, query, key)


@pytest.mark.parametrize(
    "visibility", VISIBILITIES, ids=lambda v: f"{v.pattern}-{'documents' if v.document_ids is not None else 'plain'}"
)
def test_flex_attention_equals_attention_with_the_dense_mask(visibility):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, LENGTH, 16) for _ in range(3))
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=visibility.dense(LENGTH, query.device))
    flex = flex_attention(query, key, value, block_mask=visibility.block_mask(LENGTH, query.device))
    exact = F.scaled_dot_product_attention(
        *(x.double() for x in (query, key, value)), attn_mask=visibility.dense(LENGTH, query.device)
    )
    assert (flex - exact).abs().max() <= 2 * (dense - exact).abs().max() + 1e-6


def test_annealing_starts_causal_and_ends_bidirectional():
    assert annealed("bernoulli", 0.0, 1, LENGTH, None).fused(LENGTH, LENGTH) == "causal"
    assert annealed("bernoulli", 1.0, 1, LENGTH, None).fused(LENGTH, LENGTH) == "full"
    assert annealed("none", 0.0, 1, LENGTH, None).fused(LENGTH, LENGTH) == "full"
    assert annealed("bernoulli", 0.5, 1, LENGTH, None).fused(LENGTH, LENGTH) is None


def test_the_visible_share_of_the_future_is_the_ratio_and_masks_differ_between_steps():
    length = 256
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    masks = [
        annealed("bernoulli", 0.3, step, length, None).dense(length, torch.device("cpu"))[0, 0][future]
        for step in range(4)
    ]
    num_pairs = len(masks[0])
    for mask in masks:
        assert abs(mask.double().mean() - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / num_pairs)
    # Two steps agree on a pair as often as two independent coins do.
    agreement = (masks[0] == masks[1]).double().mean()
    assert abs(agreement - (0.3**2 + 0.7**2)) < 4.5 * np.sqrt(0.25 / num_pairs)


def test_the_annealing_mask_has_no_stripes():
    """Rows and columns of the hash are independent: the variance of their sums is binomial."""
    length = 256
    dense = (
        annealed("bernoulli", 0.5, 3, 2 * length, None)
        .dense(2 * length, torch.device("cpu"))[0, 0][:length, length:]
        .double()
    )
    for sums in (dense.sum(0), dense.sum(1), dense.diagonal().unfold(0, 16, 16).sum(1) * 4):
        assert 0.5 < sums.var() / (length / 4) < 1.7


def test_documents_apart_returns_none_for_a_single_group_per_sequence():
    device = torch.device("cpu")
    one, two = np.array([[3, 3, 3]]), np.array([[3, 4, 4]])
    padded = np.array([[3, 4, -1]])
    assert documents_apart(one, True, device) is None
    assert documents_apart(two, True, device).tolist() == two.tolist()
    assert documents_apart(two, False, device) is None
    assert documents_apart(padded, False, device).tolist() == [[0, 0, -1]]
