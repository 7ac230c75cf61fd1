"""Cross pseudo supervision."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    cutmix,
    cutmix_boxes,
    full_res,
    hard_labels,
    process_count,
    random_partners,
    sigmoid_rampup,
    to_prob,
)
from nnunet_ssl.modules import MeanOfNetworks, other_network

BOXES = 3  # of the box mix, filling together
BOX_SHARE = 0.25, 0.5  # of the patch, smallest and largest
BOX_ASPECT = 4.0  # of their sides; without a limit published, where it cannot exceed 4


class SSLTrainerCPS(SemiSupervisedTrainer):
    """Cross pseudo supervision: two networks learn from each other's decisions.

    Chen, Yuan, Zeng & Wang, CVPR 2021, arXiv:2106.01226; settings of the medical form in SSL4MIS.

        z1 = student(u);  z2 = peer(u)                two networks with their own random weights
        L = sup(z1(l)) + sup(z2(l)) + w [CE(z1, argmax z2) + CE(z2, argmax z1)]
                                                               no gradient through the labels

    The student predicts, or the mean of both networks (`deploy=mean`). Both networks have their own
    gradient clipping. The peer is of the plan's architecture, or of the other one (`peer=other`):
    networks that differ make different mistakes. `peer=other+unsup_loss=dice` is cross teaching
    between CNN and transformer (Luo et al. 2022, arXiv:2112.04894) with two CNNs. With `box_mix`
    both networks learn from unlabelled patches with boxes of other patches pasted in; the labels
    come from the unmixed patches and are pasted alike.

    The networks run one after the other, so that activations are those of one; the price is one
    more pass of the peer without gradient (two with `box_mix`).

    Deviates: the paper has the cross term also on labelled patches (`on_labeled=True`) and a
    constant weight of 1 to 6; here as in SSL4MIS unlabelled patches only, and a ramp over the whole
    run. The weight is twice SSL4MIS' 0.1 because nnU-Net's supervised loss is twice the published
    one. Deep supervision as in nnU-Net. No common pretrained weights. The Dice is over foreground
    classes, without those absent from a label, which it would only push down. Padding does not
    count.
    """

    method: ClassVar[str] = "Cross pseudo supervision"
    paper: ClassVar[str] = "Chen et al. 2021, arXiv:2106.01226"
    networks: ClassVar[str] = "any plan network; peer=other: PlainConvUNet, ResidualEncoderUNet"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=None+deploy=student"
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    supports_ddp: ClassVar[bool] = True
    step_cost: ClassVar[float] = 13 / 3
    trained_networks: ClassVar[int] = 2

    deploy: Literal["teacher", "student", "mean"] = "student"  # type: ignore[assignment]
    ema_decay: float | Literal["auto"] | None = None
    peer: Literal["same", "other"] = "same"  # architecture of the second network
    # Deviates: SSL4MIS 0.1 beside (CE + Dice) / 2; nnU-Net's CE + Dice is twice that
    unsup_weight: float = 0.2  # lambda, after the ramp-up
    rampup: float = 1.0  # fraction of training until the full weight; the paper has no ramp
    unsup_loss: Literal["ce", "dice", "ce_dice"] = "ce"
    on_labeled: bool = False  # True: the cross term is the mean over all patches, as in the paper
    box_mix: bool = False  # paste boxes between unlabelled patches (the paper's CutMix form)

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(cls.unsup_weight >= 0, "unsup_weight", "0 or more")
        cls.require(cls.rampup >= 0, "rampup", "0 or more")

    def __init_subclass__(cls) -> None:
        """Let the base refuse networks that have no other architecture (settings subclass).

        The cost follows the passes without gradient, one for each further set of labels.
        """
        cls.needs_unet = cls.peer == "other"
        cls.deploys_stock = cls.deploy != "mean"
        cls.step_cost = (13 + cls.box_mix + cls.on_labeled) / 3 if cls.unsup_weight > 0 else 2.0

    @classmethod
    def refuse_unsupported(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        """Refuse also a box mix of one patch."""
        super().refuse_unsupported(plans, configuration, dataset_json)
        patches = PlansManager(plans).get_configuration(configuration).batch_size
        several = patches // process_count() > 1
        rule = "False: a GPU's batch is 1 patch, and there is no other to mix it with"
        cls.require(several or not cls.box_mix, "box_mix", rule)

    @classmethod
    def build_network_architecture(  # type: ignore[override]
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build what predicts; nnU-Net's predictor calls this."""
        size = num_input_channels, num_output_channels, enable_deep_supervision

        def planned() -> nn.Module:
            return nnUNetTrainer.build_network_architecture(
                plans_manager, configuration_manager, *size
            )

        if cls.deploy != "mean":
            return planned()
        peer = planned() if cls.peer == "same" else other_network(configuration_manager, *size)
        return MeanOfNetworks(planned(), peer, "softmax")

    def initialize(self) -> None:
        """Build both networks, and their mean if it predicts."""
        # training builds them one by one
        self.build_network_architecture = (  # type: ignore[method-assign]
            nnUNetTrainer.build_network_architecture
        )
        super().initialize()
        self._mean = MeanOfNetworks(self.network, self.companions["peer"], "softmax")
        self._mean.regions.fill_(self.regions)
        self._mean.to(self.device)

    def deployed_network(self) -> nn.Module:
        """Return what `deploy` names."""
        return self._mean if self.deploy == "mean" else super().deployed_network()

    def build_companions(self) -> dict[str, nn.Module]:
        """Return the second network, with its own random weights."""
        if self.peer == "same":
            return {"peer": self.new_network()}
        peer = other_network(
            self.configuration_manager,
            self.num_input_channels,
            self.num_heads,
            self.enable_deep_supervision,
        )
        if self._do_i_compile():
            peer.compile()
        return {"peer": peer}

    def parts(self) -> dict[str, nn.Module]:
        """Return both networks, so that both are scored and `export` finds them."""
        return {"student": self.student, "peer": self.companions["peer"]}

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the losses of both networks on labelled patches, then on unlabelled ones."""
        weight = self.unsup_weight * sigmoid_rampup(self.progress, self.rampup)
        self.track("weight", weight)
        # Deviates: the paper's mean over all patches is an option
        weight_l = weight / 2 if self.on_labeled else 0.0
        known = self.known_labels(batch)[1]
        yield from self.cross(batch.x_l, known, weight_l, {}, batch.y_l)
        if weight == 0:
            return
        x, valid = batch.x_u, batch.valid_u
        labels: dict[str, Tensor] = {}
        if self.box_mix:
            inside = cutmix_boxes(
                len(x), x.shape[2:], *BOX_SHARE, count=BOXES, aspect=BOX_ASPECT, device=x.device
            )
            unmixed = [self.decide(name, x, valid) for name in self.parts()]
            x, valid, *mixed = cutmix(inside, random_partners(len(x)), x, valid, *unmixed)
            labels = dict(zip(self.parts(), mixed, strict=True))
        yield from self.cross(x, valid, weight - weight_l, labels)

    def cross(
        self,
        x: Tensor,
        valid: Tensor,
        weight: float,
        labels: dict[str, Tensor],
        y: list[Tensor] | Tensor | None = None,
    ) -> Iterator[Terms]:
        """Yield each network's terms on patches, one network after the other.

        Args:
            x: (B, C, *).
            valid: (B, 1, *) bool, False on padding and where the annotation ignores.
            weight: of the cross term; 0 leaves it out.
            labels: hard labels by network; those that are missing are made from `x`.
            y: true targets, if there are any.
        """
        for name, other in (("student", "peer"), ("peer", "student")):
            suffix = "" if name == "student" else "_peer"
            output = self.parts()[name](x)
            terms = {} if y is None else {f"sup{suffix}": self.loss(output, y)}
            if weight:
                if name not in labels:
                    labels[name] = hard_labels(
                        to_prob(full_res(output).detach(), self.regions), self.regions
                    )
                if other not in labels:
                    labels[other] = self.decide(other, x, valid if y is None else None)
                if y is None and name == "student":
                    self.track_agreement(output, labels[other], valid)
                # Deviates: the Dice of cross teaching has background and absent classes, too
                loss = self.pseudo_loss(output, labels[other], valid, valid, self.unsup_loss)
                terms[f"unsup{suffix}"] = weight * loss
                del loss
            del output  # nothing of this network's graph stays while the other one runs
            yield terms
            del terms

    @torch.no_grad()
    def decide(self, name: str, x: Tensor, tracked: Tensor | None) -> Tensor:
        """Return a network's hard labels; the peer's, which teach the student, are logged.

        Args:
            name: "student" or "peer".
            x: (B, C, *).
            tracked: voxels to log, (B, 1, *) bool; None logs nothing.
        """
        prob = to_prob(full_res(self.parts()[name](x)), self.regions)
        if tracked is not None and name == "peer":
            self.track_pseudo_labels(prob, tracked, tracked)
        return hard_labels(prob, self.regions)
