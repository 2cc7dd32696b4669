"""What holds for every system, in any form: checks of a `Variant`.

`test_systems.py` runs `CHECKS` on the default form of each file in `networks/systems/`, a system's own test on its
variants. What is expected comes from the system itself: its branches, those evaluated, its prediction, loss weights and
options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import reference
import torch
import torch.nn.functional as F
from small_systems import (
    CLASSES,
    LABELS,
    SIZE,
    Variant,
    assert_same,
    flat,
    make_images,
    run,
    training_steps,
)
from torch import Tensor, nn
from torch.nn.parallel import scatter_gather
from torch.utils._pytree import tree_map_only
from tracing import traced

from networks import defaults_of
from networks.classifier import Classifier
from networks.outputs import SEVERAL_PER_IMAGE, NetworkOutput
from networks.system import System
from utils.errors import UserError
from utils.reporting.metrics import EpochMeter
from utils.training.execution import HALF_PRECISIONS, Execution
from utils.training.learning import Learning, Objective
from utils.training.nonfinite import NonFiniteLossError
from utils.training.schedule import plan_epoch

BY_REGION_OR_PAIR = (*SEVERAL_PER_IMAGE, "self", "other")  # branches with several predictions of an image

# ---- the output contract ------------------------------------------------------------------------------------------


def assert_contract(output: NetworkOutput, network: System, *, batch: int) -> None:
    """An output is what `NetworkOutput` promises, for a batch of so many images."""
    assert type(output) is NetworkOutput
    assert set(output.logits) <= set(network.branches)
    for name, value in flat(output).items():
        assert isinstance(value, Tensor), name
        assert value.shape[0] == batch, name
    for name, logits in output.logits.items():
        assert logits.ndim == (3 if name in BY_REGION_OR_PAIR else 2), name
        assert logits.shape[-1] == CLASSES, name
        assert logits.dtype == torch.float32, name
        assert logits.isfinite().all(), name
    for name in ("object_boxes", "window_boxes", "part_boxes"):
        boxes = getattr(output, name)
        if boxes is not None:
            assert boxes.ndim == (2 if name == "object_boxes" else 3)
            assert boxes.shape[-1] == 4
            assert boxes.dtype == torch.float32
            assert boxes.isfinite().all()
            assert not boxes.requires_grad
            assert (boxes[..., 2:] > boxes[..., :2]).all()
    for branch, boxes in (("window", output.window_boxes), ("part", output.part_boxes)):
        if branch in output.logits and boxes is not None:
            assert output.logits[branch].shape[1] == boxes.shape[1]
    if output.object_boxes is not None:
        _assert_object_boxes(output, network)
    if output.window_boxes is not None and hasattr(network.options, "windows"):
        _assert_windows(output.window_boxes, network)


def _assert_object_boxes(output: NetworkOutput, network: System) -> None:
    """Inside the input, in whole cells of the map that they were found on, unless learnt; the mask fills its box."""
    boxes = output.object_boxes
    assert (boxes >= 0).all()
    assert (boxes < network.input_size).all()
    if not hasattr(network.options, "localization_stride"):
        return
    stride = network.options.localization_stride * network.input_size / network.raw_size
    learned = network.learned_localization is not None  # its boxes may begin and end within a cell
    if not learned:
        edges = (boxes + 1) / stride
        whole = (edges - edges.round()).abs() < 1e-5
        assert ((boxes[:, :2] == 0) | whole[:, :2]).all()  # a pixel before a cell, or the border
        assert whole[:, 2:].all()  # the last pixel of a cell
    assert (boxes[:, 2:] - boxes[:, :2] + 1 > stride - 1e-4).all()
    if output.object_masks is not None:
        grid_size = network.raw_size // network.options.localization_stride
        assert output.object_masks.shape[1:] == (grid_size, grid_size)
        assert output.object_masks.dtype == torch.bool
        for mask, box in zip(output.object_masks, boxes.tolist(), strict=True):
            rows, columns = (mask.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
            cells = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            around = reference.cell_box_to_pixels(cells, stride)
            if learned:
                assert around[0] <= box[0] <= box[2] <= around[2]
                assert around[1] <= box[1] <= box[3] <= around[3]
            else:
                assert tuple(box) == pytest.approx(around, abs=1e-4)


def _assert_windows(window_boxes: Tensor, network: System) -> None:
    """As many of each size as the window set asks for, in its order, on the grid of the object crop."""
    stride, windows = network.backbone.stride, network.options.windows
    grid_size = network.input_size // stride
    window_set = {"birds": reference.BIRDS, "vehicles": reference.VEHICLES}.get(windows, windows)
    groups = reference.scale_window_set(window_set, grid_size)
    assert window_boxes.shape[1] == sum(quota for _, quota in groups)
    for one in window_boxes.tolist():
        remaining = list(one)
        for sizes, quota in groups:
            placements = reference.window_grid(sizes, grid_size, stride).tolist()
            assert all(window in placements for window in remaining[:quota])
            remaining = remaining[quota:]


@torch.no_grad()
def output_keeps_the_contract(variant: Variant) -> None:
    network = variant.evaluated
    for size in (SIZE, 2 * SIZE):
        output = network(make_images(size), mask_background=size > SIZE)
        assert_contract(output, network, batch=2)
        assert set(network.evaluated) <= set(output.logits)


@torch.no_grad()
def output_keeps_the_contract_at_other_input_sizes(variant: Variant, sizes: tuple[int, ...] = (96, 160)) -> None:
    for size in sizes:
        network, batch = variant.build(input_size=size).eval(), 1 if size == 448 else 2
        output = network(make_images(size, batch), mask_background=size == 160)
        assert_contract(output, network, batch=batch)
        assert network.predict_logits(output).shape == (batch, CLASSES)


@torch.no_grad()
def output_keeps_the_contract_in_training(variant: Variant) -> None:
    """Over the steps of a batch every branch is computed."""
    network, computed = variant.build(), set()
    for step, output, _ in training_steps(network, make_images(batch=4)):
        assert_contract(output, network, batch=len(step.images))
        computed |= set(output.logits)
    assert computed == set(network.branches)


@torch.no_grad()
def constant_images_are_taken(variant: Variant) -> None:
    """And alike wherever they stand in the batch, but for the last digit, in which rows of a product may differ."""
    network = variant.evaluated
    for value in (0.0, 1.0, -2.3):
        output = network(torch.full((2, 3, SIZE, SIZE), value), mask_background=True)
        assert_contract(output, network, batch=2)
        for name, logits in output.logits.items():
            same = torch.allclose(logits[0], logits[1], rtol=1e-6, atol=1e-7)
            assert name in variant.depends_on_batch or same, name


def images_that_are_not_square_or_too_small_are_refused(variant: Variant) -> None:
    for height, width in ((128, 160), (160, 128), (96, 96), (64, 64), (128, 127)):
        with pytest.raises(UserError, match=rf"{height}x{width}.*{SIZE}x{SIZE}"):
            variant.evaluated(torch.zeros(1, 3, height, width))


# ---- passes and branches ------------------------------------------------------------------------------------------


@torch.no_grad()
def branch_by_branch_is_computed_as_all_together(variant: Variant) -> None:
    """In no more passes; where a pass is over fewer regions, up to rounding."""
    network, images = variant.evaluated, make_images()
    everything, passes = run(network, images)
    expected = flat(everything)
    for branch in everything.logits:
        output, fewer = run(network, images, branches=(branch,))
        assert branch in output.logits
        assert len(fewer) <= len(passes)
        exactly = all(some.shape == whole.shape for some, whole in zip(fewer, passes, strict=False))
        for name, value in flat(output).items():
            if name.startswith("logits.") and not exactly:
                torch.testing.assert_close(value, expected[name])
            elif value.shape == expected[name].shape:
                assert torch.equal(value, expected[name]), (branch, name)
            else:
                assert not exactly, (branch, name)


@torch.no_grad()
def evaluation_computes_what_it_reports(variant: Variant) -> None:
    """Those branches and no others, the prediction's among them."""
    network = variant.evaluated
    assert set(network.prediction) <= set(network.evaluated) <= set(network.branches)
    output = network(make_images(), branches=network.evaluated)
    assert set(output.logits) == set(network.evaluated)
    prediction = network.predict_logits(output)
    assert prediction.shape == (2, CLASSES)
    assert prediction.isfinite().all()


def branches_of_training_alone_are_refused_in_evaluation(variant: Variant) -> None:
    network, images = variant.evaluated, make_images(batch=1)
    with torch.no_grad():
        computed = network(images).logits.keys()
    for branch in network.branches:
        if branch not in computed:
            with pytest.raises(UserError, match=branch):
                network(images, branches=(branch,))


@torch.no_grad()
def unknown_branches_are_refused(variant: Variant) -> None:
    network, images = variant.build_scripted(), make_images(batch=2)
    for branches in (("elephant",), (*network.evaluated, "elephant"), ()):
        for mode in (True, False):
            with pytest.raises(UserError, match="branches"):
                network.train(mode)(images, branches=branches)


@torch.no_grad()
def prediction_ensembles_its_branches(variant: Variant) -> None:
    """Of any that are chosen, as the system does or is told; a system with another rule tests that one itself."""
    network = variant.evaluated
    if type(network).predict_logits is not System.predict_logits:
        return
    output = network(make_images())
    choices = tuple(name for name in network.evaluated if name not in SEVERAL_PER_IMAGE)
    own = defaults_of(type(network), None).get("ensembling", "mean_probability")
    for prediction in {network.prediction, choices, choices[-1:]}:
        chosen = variant.build_scripted(prediction=prediction)
        assert (chosen.prediction, chosen.ensembling) == (prediction, own)
        logits = torch.stack([output.logits[name] for name in prediction])
        expected = {
            "mean_probability": logits.softmax(-1).mean(dim=0),
            "mean_logits": logits.mean(dim=0).softmax(-1),
            "sum_logits": logits.sum(dim=0).softmax(-1),
            "learned": logits.log_softmax(-1).mean(dim=0).softmax(-1),  # as long as nothing is learnt
        }
        for chosen.ensembling in (own, "mean_logits"):
            torch.testing.assert_close(chosen.predict_logits(output).softmax(-1), expected[chosen.ensembling])


def background_is_masked_only_where_there_are_masks(variant: Variant) -> None:
    network, images = variant.evaluated, make_images(2 * SIZE)
    with torch.no_grad():
        plain, masked = (network(images, mask_background=mask) for mask in (False, True))
    if plain.object_masks is None:
        assert not any(network.masks_background(epoch) for epoch in (1, 100, 1000))
        assert list(flat(plain)) == list(flat(masked))
        assert all(torch.equal(value, flat(masked)[name]) for name, value in flat(plain).items())
    else:
        assert torch.equal(plain.object_masks, masked.object_masks)


# ---- learning -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def every_loss_term_has_a_weight(variant: Variant) -> None:
    """And every weight a term that some step of a batch trains; a step's total is their weighted sum."""
    network, trained = variant.build(input_size=96), set()
    for step, _, terms in training_steps(network, make_images(96, batch=4)):
        total = terms.pop("total")
        assert terms.keys() <= network.loss_weights.keys()
        assert all(term.shape == () and term.dtype == torch.float32 and term.isfinite() for term in terms.values())
        expected = sum(network.loss_weights[name] * term for name, term in terms.items())
        torch.testing.assert_close(total, expected)
        trained |= terms.keys()
        assert step.terms is None or terms.keys() == set(step.terms)
    assert trained == network.loss_weights.keys()


def gradient_reaches_every_parameter(variant: Variant) -> None:
    """Over the steps of a batch, of which none has to reach all.

    A bias before a batch norm shifts what that takes away again: of it something is to be seen with the running
    statistics.
    """
    network = variant.build(input_size=96)
    gradients = _gradients(network)
    lost = [name for name, gradient in gradients.items() if gradient.abs().max() <= 1e-7]
    if lost:
        assert all(name.endswith("bias") for name in lost), lost
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
                module.training = False
        gradients = _gradients(network)
        assert all(gradients[name].abs().max() > 1e-7 for name in lost), lost


def _gradients(network: System) -> dict[str, Tensor]:
    network.zero_grad()
    for _, _, terms in training_steps(network, make_images(96, batch=4)):
        terms["total"].backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.requires_grad}


def the_smallest_batch_is_learnt_from(variant: Variant) -> None:
    """And smaller ones are not, so that what a system says of itself is no more than it needs."""
    network = variant.build_scripted()
    for count in range(1, network.smallest_batch + 1):
        with pytest.raises(ValueError, match="more than 1 value") if count < network.smallest_batch else nullcontext():
            steps = training_steps(network, make_images(batch=count), LABELS[:count])
            assert all(terms["total"].isfinite() for *_, terms in steps)


def parameter_groups_hold_every_parameter_once(variant: Variant) -> None:
    network = variant.build_scripted()
    groups = network.parameter_groups()
    parameters = [id(parameter) for group in groups.values() for parameter in group]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == {id(p) for p in network.parameters() if p.requires_grad}
    assert groups.keys() - {"trunk", "heads"} <= network.learning_rate_factors.keys()


def heads_are_parts_that_start_from_random_weights(variant: Variant) -> None:
    network = variant.build_scripted()
    trunk = {id(parameter) for parameter in network.backbone.parameters()}
    heads = [id(parameter) for head in network.heads() for parameter in head.parameters()]
    assert len(heads) == len(set(heads)) > 0
    assert not trunk & set(heads)
    for module in network.modules():
        if isinstance(module, Classifier):
            assert {id(parameter) for parameter in module.parameters()} <= set(heads)


def weights_are_checked_before_a_save_within_an_epoch(variant: Variant) -> None:
    """On a batch that was learnt from, in evaluation, which lacks what only training has; also where only that trains.

    Where the weights are whole, that raises nothing; a broken one is told.
    """
    images, names = make_images(96, batch=4), [str(number) for number in range(4)]
    network = variant.build_scripted(input_size=96)
    for trained in (network.loss_weights, *({name: 1.0} for name in network.loss_weights)):
        plan = plan_epoch(network, 1, trained, warmup_epochs=0)
        objective = Objective(plan, Execution(torch.device("cpu")), 0.0)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
        learning = Learning(network.train(), optimizer, objective, 1.0, None)
        learning.learn_from(images, LABELS, 1, names, EpochMeter(torch.device("cpu")))
        learning.check_everything(images, LABELS, 1, names)
        assert network.training
    with torch.no_grad():
        next(network.backbone.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="step 1"):
        learning.check_everything(images, LABELS, 1, names)


@torch.no_grad()
def evaluation_has_nothing_random(variant: Variant) -> None:
    network, images = variant.build_scripted(dropout=0.5).eval(), make_images()
    state = torch.get_rng_state()
    first, second = flat(network(images)), flat(network(images))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def dropout_acts_on_every_branch(variant: Variant) -> None:
    """In training. Not among `CHECKS`, as a system may have no dropout."""
    network, images = variant.build_scripted(dropout=0.5).train(), make_images()
    first, second = network(images).logits, network(images).logits
    assert set(first) == set(network.branches)
    assert all(not torch.equal(first[name], second[name]) for name in first)


# ---- independence of the batch and of the size of images ----------------------------------------------------------


@torch.no_grad()
def batched_equals_one_by_one_and_shuffled(variant: Variant) -> None:
    network, images = variant.evaluated, make_images(batch=3)
    together = network(images, mask_background=True)
    for order in ([0], [1], [2], [2, 0, 1]):
        got, expected = network(images[order], mask_background=True), _indexed(together, order)
        assert_same(got, expected, except_for=variant.depends_on_batch)


def _indexed(output: NetworkOutput, order: list[int]) -> NetworkOutput:
    def at(value: Tensor | dict[str, Tensor] | None) -> Tensor | dict[str, Tensor] | None:
        if isinstance(value, dict):
            return {name: item[order] for name, item in value.items()}
        return None if value is None else value[order]

    return NetworkOutput(*map(at, output))


@torch.no_grad()
def larger_images_are_scaled_down_for_the_first_pass(variant: Variant) -> None:
    """What is found in it is in `input_size` pixels, whatever came."""
    network = variant.evaluated
    passes = {branch: len(run(network, make_images(), branches=(branch,))[1]) for branch in network.evaluated}
    of_first_pass = {"object_boxes", "object_masks", "part_boxes"}
    of_first_pass |= {f"logits.{branch}" for branch, count in passes.items() if count == 1}
    for size in (160, 256):
        images, side = make_images(size), network.raw_size
        small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        output, given = run(network, images, branches=network.evaluated)
        assert torch.equal(given[0], small)
        if side < SIZE:
            continue  # what is small already cannot be given in place of the images
        found, expected = flat(output), flat(network(small, branches=network.evaluated))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in of_first_pass & found.keys())


# ---- precision, tracing, several devices --------------------------------------------------------------------------


def mixed_precision_keeps_logits_and_losses_in_float32(
    variant: Variant, *, scripted: bool = True, precision: str = "bf16"
) -> None:
    """On a scripted trunk, cast, as convolutions in bf16 can be very slow; or on the real one."""
    half = HALF_PRECISIONS[precision]
    network = variant.build_scripted(input_size=96) if scripted else variant.build(input_size=96)
    if scripted:
        network.backbone.register_forward_hook(
            lambda trunk, images, maps: tree_map_only(Tensor, lambda m: m.to(half), maps)
        )
    with torch.autocast("cpu", dtype=half), torch.no_grad():
        _assert_not_rounded(network.eval()(make_images(192), mask_background=True), network, half, batch=2)
    trained = set()
    for step, output, terms in training_steps(network, make_images(192, batch=4), precision=precision):
        _assert_not_rounded(output, network, half, batch=len(step.images))
        assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
        terms.pop("total").backward()
        trained |= terms.keys()
    assert trained == network.loss_weights.keys()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def fp16_keeps_logits_and_losses_in_float32(variant: Variant) -> None:
    mixed_precision_keeps_logits_and_losses_in_float32(variant, precision="fp16")


def _assert_not_rounded(output: NetworkOutput, network: System, half: torch.dtype, *, batch: int) -> None:
    assert_contract(output, network, batch=batch)
    assert all(value.isfinite().all() for value in flat(output).values())
    for name, logits in output.logits.items():  # not rounded on the way either
        assert not torch.equal(logits, logits.to(half).float()), name


@torch.no_grad()
def forward_traces_without_graph_break(network: System, images: Tensor) -> None:
    """Not among `CHECKS`: it is dear."""
    compiled = traced(network.eval())
    assert_same(compiled(images, mask_background=True), network(images, mask_background=True))


@torch.no_grad()
def host_waits_nowhere(variant: Variant) -> None:
    """In evaluation, nor in its prediction and losses."""
    network, images = variant.evaluated, make_images(2 * SIZE, batch=1)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was read on the host")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"):
            patch.setattr(Tensor, name, refuse)
        with reference.ForbidHostReads():
            output = network(images, mask_background=True)
            network.predict_logits(output)
            network.losses(output, LABELS[:1])


@torch.no_grad()
def outputs_survive_the_gather_of_data_parallel(variant: Variant) -> None:
    """PyTorch's own recursion over an output; only its copy between devices is replaced, which a CPU does not have."""

    class GatherOnTheHost:
        @staticmethod
        def apply(device: object, dim: int, *tensors: Tensor) -> Tensor:
            return torch.cat(tensors, dim=dim)

    network, images = variant.evaluated, make_images(batch=3)
    for branches in (None, network.evaluated[:1]):
        whole = network(images, branches=branches)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scatter_gather, "Gather", GatherOnTheHost)
            parts = [network(part, branches=branches) for part in (images[:2], images[2:])]
            gathered = scatter_gather.gather(parts, "cpu")
        assert type(gathered) is NetworkOutput
        assert_same(gathered, whole, except_for=variant.depends_on_batch)
        assert_contract(gathered, network, batch=3)


Check = Callable[[Variant], None]
CHECKS: tuple[Check, ...] = (
    output_keeps_the_contract,
    output_keeps_the_contract_at_other_input_sizes,
    output_keeps_the_contract_in_training,
    constant_images_are_taken,
    images_that_are_not_square_or_too_small_are_refused,
    branch_by_branch_is_computed_as_all_together,
    evaluation_computes_what_it_reports,
    branches_of_training_alone_are_refused_in_evaluation,
    unknown_branches_are_refused,
    prediction_ensembles_its_branches,
    background_is_masked_only_where_there_are_masks,
    every_loss_term_has_a_weight,
    gradient_reaches_every_parameter,
    the_smallest_batch_is_learnt_from,
    parameter_groups_hold_every_parameter_once,
    heads_are_parts_that_start_from_random_weights,
    weights_are_checked_before_a_save_within_an_epoch,
    evaluation_has_nothing_random,
    batched_equals_one_by_one_and_shuffled,
    larger_images_are_scaled_down_for_the_first_pass,
    mixed_precision_keeps_logits_and_losses_in_float32,
    fp16_keeps_logits_and_losses_in_float32,
    host_waits_nowhere,
    outputs_survive_the_gather_of_data_parallel,
)
