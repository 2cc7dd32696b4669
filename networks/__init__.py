"""The systems and the parts they are made of: `build_network("sgkrl", num_classes=200)`.

A system is a file in `networks/systems/`: the folder's listing is the list of systems (`MODELS`). What they have in
common is in `networks/system.py`; every other file here is a part.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping

import networks.systems
from networks.backbone import STRIDE, Backbone
from networks.outputs import ENSEMBLINGS, SEVERAL_PER_IMAGE
from networks.shared import Shared
from networks.system import System
from networks.system_slips import refuse_slips as refuse_slips
from networks.trunks import BACKBONES as BACKBONES
from networks.trunks import check_trunk as check_trunk
from utils.errors import UserError
from utils.options import Probability, SettingsError, as_annotated, checked, shortened, shown

MODELS = tuple(sorted(m.name for m in pkgutil.iter_modules(networks.systems.__path__) if not m.name.startswith("_")))


def find_system(name: str) -> type[System]:
    """Return the class in `networks/systems/<name>.py`. Raises SettingsError for a name without a file."""
    if name not in MODELS:
        raise SettingsError(f"unknown model {shown(name)}; choose one of {', '.join(MODELS)}")
    module = importlib.import_module(f"networks.systems.{name}")
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    systems = [value for value in own if issubclass(value, System)]
    if len(systems) != 1:
        raise UserError(f"{module.__file__} defines {len(systems)} subclasses of System; expected one, the system")
    return systems[0]


def build_options(system: type[System], given: Mapping[str, object], shared: Shared) -> object:
    """Return the options of a system, complete and checked. Raises SettingsError for unknown and impossible ones."""
    for name in given:
        if name not in _names(system.Options):
            raise SettingsError(refusal_of_option(name, system))
    options = checked(system.Options(**given))
    if hasattr(options, "completed"):
        options = options.completed(shared)
    if hasattr(options, "check"):
        options.check(shared)
    return options


def own_settings(model: object) -> list[str]:
    """Return the names of a system's own settings: of one that is not there, or not to be imported, none."""
    try:
        return _names(find_system(model).Options)
    except Exception:  # a file that is being written, of which no run may know
        return []


def settings_of_systems() -> set[str]:
    """Return the names of all settings that are some system's own."""
    return {name for model in MODELS for name in own_settings(model)}


def owners_of(name: str) -> list[str]:
    """Return the systems that have a setting of this name of their own."""
    return [model for model in MODELS if name in own_settings(model)]


def refusal_of_option(name: str, system: type[System]) -> str:
    """Say why a setting is none of this system: it is another one's, or nobody's."""
    owners, name = owners_of(name), shortened(name) if name.isidentifier() else shown(name)
    if owners:
        listed = " and ".join(filter(None, (", ".join(owners[:-1]), owners[-1])))
        return f"{name} is a setting of {listed}, not of {name_of(system)}: leave it out, or choose another model"
    own = ", ".join(_names(system.Options)) or "none"
    return f"{name} is no setting of {name_of(system)}: its own are {own}"


def _names(options: type) -> list[str]:
    return [field.name for field in dataclasses.fields(options)]


def name_of(system: type[System] | System) -> str:
    """Return the name of a system's file, by which it is chosen."""
    return (system if isinstance(system, type) else type(system)).__module__.rpartition(".")[2]


def defaults_of(system: type[System], shared: Shared | None) -> dict[str, object]:
    """Return the system's own defaults of shared settings; without `shared` only those that do not follow from it."""
    known = {name: value for name, value in system.run_defaults.items() if shared or not callable(value)}
    return {name: value(shared) if callable(value) else value for name, value in known.items()}


def build_network(
    name: str,
    *,
    num_classes: int,
    backbone: str | None = None,
    pretrained: str | None = None,
    stride_on_first_conv: bool = False,
    batch_norm: str | None = None,
    last_stride: int | None = None,
    input_size: int | None = None,
    dropout: float | None = None,
    prediction: tuple[str, ...] | None = None,
    ensembling: str | None = None,
    **options: object,
) -> System:
    """Build a system by the name of its file, as `python train.py --model <name>` builds it on the same settings.

    Args:
        backbone: one of `networks.trunks.BACKBONES`; None: the system's own choice, or resnet50.
        pretrained: torchvision weights such as "IMAGENET1K_V2", or a .pth file; None: none are loaded, those of a
            checkpoint will follow; "none": none, the network learns from its random weights. The batch norms and boxes
            of some systems differ by default where they start from random weights.
        batch_norm: shared, per_pass or frozen (see `networks.backbone.Backbone`); None: the system's own choice.
        last_stride: 2, or 1 for final maps of twice the resolution; None: the system's own choice, or 2.
        input_size: side in pixels of what the backbone sees; `forward` takes pictures of that size or larger ones;
            None: the system's own choice, or 448.
        dropout: before every classifier; None: the system's own choice, or 0.5.
        prediction: the branches that are ensembled; None: the system's own choice.
        ensembling: mean_probability, mean_logits, sum_logits or learned, what of these is the prediction; None: the
            system's own choice, or mean_probability. `learned`: the buffer `ensemble_weights`, which begins equal.
        options: the system's own settings, such as `windows="birds"`: see `Options` in its file.

    Raises UserError for what cannot be built, SettingsError for options that the system does not have.
    """
    system = find_system(name)
    values = {"backbone": backbone, "last_stride": last_stride, "input_size": input_size, "dropout": dropout}
    given = {key: value for key, value in values.items() if value is not None}
    _check_numbers(num_classes, Shared(pretrained=pretrained, **given))  # before anything follows from them
    own = defaults_of(system, Shared(pretrained=pretrained, **given))
    shared = Shared(pretrained=pretrained, **{key: own[key] for key in values if key in own} | given)
    build_options(system, options, shared)  # before weights are downloaded
    trunk = Backbone(
        shared.backbone,
        pretrained=None if pretrained == "none" else pretrained,
        stride_on_first_conv=stride_on_first_conv,
        batch_norm=batch_norm or defaults_of(system, shared).get("batch_norm", "shared"),
        last_stride=shared.last_stride,
    )
    return build_on_trunk(
        name, trunk, num_classes, shared=shared, prediction=prediction, ensembling=ensembling, **options
    )


def build_on_trunk(
    name: str,
    trunk: Backbone,
    num_classes: int,
    *,
    shared: Shared,
    prediction: tuple[str, ...] | None = None,
    ensembling: str | None = None,
    **options: object,
) -> System:
    """Build a system on a trunk that is there; see `build_network`."""
    _check_numbers(num_classes, shared)
    system = find_system(name)
    network = system(trunk, num_classes, build_options(system, options, shared), shared)
    if prediction is not None:
        choices = [branch for branch in network.evaluated if branch not in SEVERAL_PER_IMAGE]
        if not prediction or not set(prediction) <= set(choices) or len(set(prediction)) < len(prediction):
            raise UserError(
                f"prediction is {prediction!r}; choose from the branches of {name}, {', '.join(choices)}, each once"
            )
        network.prediction = tuple(prediction)
    ensembling = ensembling or defaults_of(system, shared).get("ensembling", network.ensembling)
    if ensembling not in ENSEMBLINGS:
        raise UserError(f"ensembling is {shown(ensembling)}; choose one of {', '.join(ENSEMBLINGS)}")
    network.ensemble_by(ensembling)
    return network


def _check_numbers(num_classes: int, shared: Shared) -> None:
    as_annotated("num_classes", num_classes, int)
    as_annotated("dropout", shared.dropout, Probability)
    input_size = as_annotated("input_size", shared.input_size, int)
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}; expected at least 2")
    if input_size % STRIDE or input_size < 3 * STRIDE:
        raise UserError(f"input_size is {input_size}; expected a multiple of {STRIDE}, at least {3 * STRIDE}")
