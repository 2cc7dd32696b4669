"""RegNets, X and Y: without and with squeeze and excitation.

Radosavovic, Kosaraju, Girshick, He & Dollar, "Designing Network Design Spaces", CVPR 2020. The cells of Y depend on the
mean of the whole map, so that a denser one would not hold the others: there are no dense maps.
"""

from __future__ import annotations

from torch import Tensor, nn

from networks.trunks.family import Family, Maps, run_stage


class RegNets(Family):
    one_block = (
        *("regnet_y_3_2gf", "regnet_y_8gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"),
        *("regnet_x_8gf", "regnet_x_16gf", "regnet_x_32gf"),
    )
    names = (
        *("regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf"),
        *("regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf"),
        *one_block,
    )
    classifier = "fc."

    @staticmethod
    def stages(trunk: nn.Module) -> list[nn.Sequential]:
        return list(trunk.trunk_output)

    @staticmethod
    def channels(trunk: nn.Module) -> dict[str, int]:
        _, _, into_stage3, into_stage4 = (next(stage[0].f.a.children()).in_channels for stage in trunk.trunk_output)
        return {"stage2": into_stage3, "stage3": into_stage4, "final": trunk.fc.in_features}

    @staticmethod
    def remove_classifier(trunk: nn.Module) -> None:
        trunk.fc = nn.Identity()

    @staticmethod
    def begin(trunk: nn.Module, images: Tensor, *, frozen: bool, split: bool, until: str) -> Maps:
        stage1, stage2, stage3, _ = trunk.trunk_output
        x = stage2(stage1(trunk.stem(images)))
        return Maps(x) if until == "stage2" else Maps(x, stage3(x))

    @staticmethod
    def finish(trunk: nn.Module, stage3: Tensor, *, frozen: bool, dense: bool, split: bool) -> Maps:
        *_, stage4 = trunk.trunk_output
        penultimate, final = run_stage(stage4, stage3)
        return Maps(penultimate=penultimate if len(stage4) > 1 else None, final=final)
