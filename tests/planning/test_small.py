import pytest
import torch
from make_data import make_raw_dataset
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.unlabeled import preprocessing_key
from nnunet_ssl.planning.api import plan_and_preprocess
from nnunet_ssl.planning.small import shrink_plans


@pytest.fixture(params=["ExperimentPlanner", "nnUNetPlannerResEncM"])
def plans(request, roots):
    make_raw_dataset(roots / "raw", num_labeled=1, num_unlabeled=1)
    name = plan_and_preprocess(901, ["2d"], planner=request.param, num_processes=1)
    return PlansManager(str(roots / "preprocessed" / "Dataset901_Toy" / f"{name}.json")).plans


@pytest.mark.parametrize(
    "configuration, patch", [("2d", (24, 20)), ("3d_fullres", (12, 16, 20)), ("3d_fullres", None)]
)
def test_small_network_runs_on_its_patch(plans, configuration, patch):
    small = shrink_plans(plans, configuration, (4, 6, 8), patch, batch_size=3)
    config = PlansManager(small).get_configuration(configuration)
    network = get_network_from_plans(
        config.network_arch_class_name,
        config.network_arch_init_kwargs,
        config.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=True,
    )
    outputs = network(torch.zeros(2, 1, *config.patch_size))
    assert outputs[0].shape == (2, 3, *config.patch_size)
    assert len(outputs) == 2
    assert sum(p.numel() for p in network.parameters()) < 20_000
    assert config.batch_size == 3
    if patch is not None:
        assert tuple(config.patch_size) == patch
    assert config.batch_dice == plans["configurations"][configuration]["batch_dice"]
    assert preprocessing_key(small, configuration) == preprocessing_key(plans, configuration)
    assert plans["configurations"][configuration]["architecture"]["arch_kwargs"]["n_stages"] > 3


def test_axes_that_cannot_be_halved_keep_their_size(plans):
    small = shrink_plans(plans, "3d_fullres", (4, 6, 8), (6, 16, 16))
    strides = small["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"]
    assert strides[0] == [1, 1, 1]
    for axis, size in enumerate((6, 16, 16)):
        product = strides[1][axis] * strides[2][axis]
        assert size % product == 0
        assert size // product > 1


def test_bad_numbers(plans):
    with pytest.raises(ValueError, match="9 stages asked for"):
        shrink_plans(plans, "2d", (4,) * 9)
    with pytest.raises(ValueError, match="at least 3 are needed"):
        shrink_plans(plans, "2d", (4, 8))
    with pytest.raises(ValueError, match="has not the dimension"):
        shrink_plans(plans, "2d", (4, 8, 8), (8, 8, 8))
