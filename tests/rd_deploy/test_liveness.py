"""What is live and what shortcuts hold during single steps, counted by hand."""

from onnx_builder import UNIT, Builder, elements

from rd_deploy.memory import ledger


def test_first_identity_block_by_hand():
    """(live, held by the shortcut) of layer1.1, in units: the wide input waits during the 3x3 only for the addition."""
    expected = {
        "separate": [(4 + 1, 0), (4 + 1 + 1, 4), (4 + 1 + 4, 4)],
        "in-place": [(4 + 1, 0), (4 + 1 + 1, 4), (1 + 4, 0)],  # the shortcut's buffer is the sum's
    }
    for policy, counts in expected.items():
        steps = [step for step in elements(50, True, policy).steps if step.name.startswith("layer1.1.")]
        assert [(step.live_bytes / UNIT, step.shortcut_bytes / UNIT) for step in steps] == counts
        assert [step.op for step in steps] == ["Conv+Relu", "Conv+Relu", "Conv+Add+Relu"]
        assert [(step.read_bytes / UNIT, step.written_bytes / UNIT) for step in steps] == [(4, 1), (1, 1), (1 + 4, 4)]


def test_projection_block_by_hand():
    """(live, held by the shortcut) of layer2.0 in units: 4 u in, 2 u out, the branches in their best order."""
    expected = {
        # Projection before expand: then the 4 u are gone when expand accumulates onto the projection's 2 u (the other
        # way round the peak is the same, but expand needs 6.5 u and the projection 6 u).
        "in-place": {
            "reduce": (4 + 2, 0),
            "conv3x3": (4 + 2 + 0.5, 4),
            "downsample": (4 + 0.5 + 2, 4 + 2),
            "expand": (0.5 + 2, 0),
        },
        # Likewise, and there are never three maps of the block's size beside the 4 u (else 8 u).
        "separate": {
            "reduce": (4 + 2, 0),
            "conv3x3": (4 + 2 + 0.5, 4),
            "downsample": (4 + 0.5 + 2, 4 + 2),
            "expand": (0.5 + 2 + 2, 2),
        },
    }
    for policy, counts in expected.items():
        steps = [step for step in elements(50, True, policy).steps if step.name.startswith("layer2.0.")]
        found = {step.name.split(".")[-1]: (step.live_bytes / UNIT, step.shortcut_bytes / UNIT) for step in steps}
        assert list(found.items()) == list(counts.items()), policy


def test_what_a_projection_adds_counts_as_held_when_it_runs_last():
    """layer1.0, separate, where the order of the branches does not matter (9 u either way): in + main path + sum."""
    (last,) = (step for step in elements(50, True, "separate").steps if step.name == "layer1.0.downsample")
    assert (last.op, last.live_bytes / UNIT, last.shortcut_bytes / UNIT) == ("Conv+Add+Relu", 1 + 4 + 4, 1 + 4)


def test_views_cost_nothing_and_pointwise_operators_overwrite_what_dies():
    builder = Builder()
    pooled = builder.op("MaxPool", "image", kernel_shape=[1, 1])
    view = builder.op("Identity", builder.op("Dropout", pooled, outputs=2))
    activated = builder.op("Sigmoid", view)  # overwrites the pooled map: nothing else reads it
    branch = builder.op("Tanh", activated)  # cannot: the product reads it too
    model = builder.model(["N", 4, 2, 2], builder.op("Mul", activated, branch))
    for policy, product in (("separate", 48), ("in-place", 32)):
        found = ledger(model, element_bytes=1, policy=policy)
        assert [step.op for step in found.steps] == ["MaxPool", "Sigmoid", "Tanh", "Mul"]
        assert [step.live_bytes for step in found.steps] == [32, 16, 32, product]
