"""Methods that train two different networks and predict with the mean of both."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_ssl.base import Phase, SemiSupervisedTrainer, Terms
from nnunet_ssl.functional import early_gradients
from nnunet_ssl.modules import MeanOfNetworks, other_network
from nnunet_ssl.modules.networks import Link


class TwoNetworkTrainer(SemiSupervisedTrainer):
    """Trains the plan's network beside the other architecture of the same plan.

    The trained, saved and predicting network is a `MeanOfNetworks`: `student` is the plan's own
    network, `peer` the other one. Methods call these two; prediction needs this package, unless
    `nnunet_ssl export --network student` takes the student alone.
    """

    deploys_stock: ClassVar[bool] = False
    deployed: ClassVar[str] = "mean of student and peer"
    needs_unet: ClassVar[bool] = True
    networks: ClassVar[str] = "PlainConvUNet, ResidualEncoderUNet"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=None+deploy=student"
    trained_networks: ClassVar[int] = 2

    deploy: Literal["student"] = "student"
    ema_decay: None = None

    _pair: MeanOfNetworks | None = None  # both networks, while `network` is the student

    @classmethod
    def link(cls) -> Link:
        """Return what the networks' logits stand for."""
        return "softmax"

    @classmethod
    def build_network_architecture(  # type: ignore[override]
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build both networks; nnU-Net's predictor calls this as well."""
        size = num_input_channels, num_output_channels, enable_deep_supervision
        return MeanOfNetworks(
            nnUNetTrainer.build_network_architecture(plans_manager, configuration_manager, *size),
            other_network(configuration_manager, *size),
            cls.link(),
        )

    def initialize(self) -> None:
        """Build both; tell the network whether its channels are regions."""
        super().initialize()
        self.network.regions.fill_(self.regions)
        self._pair, self.network = self.network, self.student

    def on_train_start(self) -> None:
        """Start the training of both networks."""
        self._put_pair_back()
        super().on_train_start()

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Load a checkpoint, which holds both networks."""
        self._put_pair_back()
        super().load_checkpoint(filename_or_checkpoint)

    def _put_pair_back(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self.network = self.pair

    def phases(self) -> list[Phase]:
        """Return the one update, with gradients clipped for each network by itself."""
        (phase,) = super().phases()
        return [replace(phase, modules=[self.student, self.peer, *phase.modules[1:]])]

    def parts(self) -> dict[str, nn.Module]:
        """Return the two networks."""
        return {"student": self.student, "peer": self.peer}

    def terms_at(
        self, outputs: Sequence[Any], losses: Callable[[list[Any]], Iterable[Terms]]
    ) -> Terms:
        """Return terms of a loss on both networks' outputs, with the loss's own graph freed.

        Both networks' graphs are alive, so that of the loss is kept small: `early_gradients`.

        Args:
            outputs: as the networks return them, with or without deep supervision.
            losses: generator of terms from such outputs.
        """
        single = isinstance(outputs[0], Tensor)
        flat = tuple(t for o in outputs for t in ([o] if single else o))
        each = len(flat) // len(outputs)

        def joint(chunks: list[tuple[Tensor, ...]]) -> Iterable[Terms]:
            (leaves,) = chunks
            parts = [list(leaves[i : i + each]) for i in range(0, len(leaves), each)]
            return losses([part[0] for part in parts] if single else parts)

        return early_gradients(flat, joint)

    @property
    def pair(self) -> MeanOfNetworks:
        """Both networks."""
        return self._pair or self.network

    @property
    def student(self) -> nn.Module:
        """The plan's own network."""
        return self.pair.a

    @property
    def peer(self) -> nn.Module:
        """The network of the other architecture."""
        return self.pair.b
