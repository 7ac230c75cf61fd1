"""The supervised twin."""

from collections.abc import Iterator
from typing import ClassVar

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch


class SSLTrainerSupervised(SemiSupervisedTrainer):
    """The supervised twin: what every claim about a method stands beside.

    Same loop, augmentation, steps, labelled batch, EMA teacher and deployment as the
    semi-supervised trainers, and nnU-Net's own loss; scans without masks are not even opened.
    """

    method: ClassVar[str] = "supervised twin"
    paper: ClassVar[str] = "Isensee et al. 2021 (nnU-Net), with an EMA of the weights"
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    supports_ddp: ClassVar[bool] = True
    uses_unlabeled: ClassVar[bool] = False

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield nnU-Net's loss on the labelled patches."""
        yield {"sup": self.loss(self.student(batch.x_l), batch.y_l)}
