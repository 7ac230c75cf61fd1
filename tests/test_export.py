"""Export: the receiver's nnU-Net reads it, and bad input leaves nothing behind."""

import errno
import json

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl import cli
from nnunet_ssl.errors import UserError
from nnunet_ssl.export import export_model

DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "organ": 1},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
PLANS = {
    "dataset_name": "Dataset004_X",
    "plans_name": "nnUNetPlans",
    "configurations": {
        "2d": {
            "spacing": [1.0, 1.0],
            "patch_size": [8, 8],
            "batch_size": 2,
            "architecture": {
                "network_class_name": (
                    "dynamic_network_architectures.architectures.unet.PlainConvUNet"
                ),
                "arch_kwargs": {
                    "n_stages": 2,
                    "features_per_stage": [4, 8],
                    "conv_op": "torch.nn.modules.conv.Conv2d",
                    "kernel_sizes": [[3, 3], [3, 3]],
                    "strides": [[1, 1], [2, 2]],
                    "n_conv_per_stage": [1, 1],
                    "n_conv_per_stage_decoder": [1],
                    "conv_bias": True,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }
    },
}


def network():
    plans = PlansManager(PLANS)
    config = plans.get_configuration("2d")
    return nnUNetTrainer.build_network_architecture(plans, config, 1, 2, True)


@pytest.fixture
def model(tmp_path):
    """A model folder with two folds; student and teacher differ."""
    folder = tmp_path / "Dataset004_X" / "SSLTrainer__nnUNetPlans__2d"
    for fold in ("0", "all"):
        student, teacher = network(), network()
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.save(
            {
                "network_weights": teacher.state_dict(),
                "optimizer_state": {"momentum": torch.zeros(100_000)},
                "grad_scaler_state": None,
                "logging": {"losses": [1.0] * 100},
                "_best_ema": 0.5,
                "current_epoch": 4,
                "init_args": {
                    "plans": PLANS,
                    "configuration": "2d",
                    "fold": fold,
                    "dataset_json": DATASET_JSON,
                    "device": torch.device("cuda", 0),
                },
                "trainer_name": "nnUNetTrainer",
                "inference_allowed_mirroring_axes": (0, 1),
                "ssl_state": {
                    "format": 1,
                    "trainer": "SSLTrainer",
                    "deploy": "teacher",
                    "student": student.state_dict(),
                    "companions": {"teacher": teacher.state_dict()},
                },
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    (folder / "plans.json").write_text(json.dumps(PLANS))
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (folder / "dataset_fingerprint.json").write_text("{}")
    return folder


def read(folder, fold="all"):
    return torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)


def edit(model, change, fold="all"):
    checkpoint = read(model, fold)
    change(checkpoint)
    torch.save(checkpoint, model / f"fold_{fold}" / "checkpoint_final.pth")


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_slim_folder_predicts_like_the_model(model, tmp_path):
    out = tmp_path / "share"
    text = export_model(model, out)
    size = (out / "fold_all" / "checkpoint_final.pth").stat().st_size
    assert size < (model / "fold_all" / "checkpoint_final.pth").stat().st_size / 5
    assert not list(tmp_path.glob("*.part"))

    logits = []
    image = torch.rand(1, 1, 8, 8)
    for folder in (model, out):
        predictor = nnUNetPredictor(device=torch.device("cpu"))
        predictor.initialize_from_trained_model_folder(str(folder), ("0", "all"))
        assert predictor.allowed_mirroring_axes == (0, 1)
        logits.append(predictor.predict_logits_from_preprocessed_data(image))
    assert torch.equal(*logits)

    assert f"nnUNetv2_predict_from_modelfolder -i INPUT -o OUTPUT -m {out} -f 0 all" in text
    assert "nnUNetv2_predict -i INPUT -o OUTPUT -d Dataset004_X -c 2d -tr SSLTrainer" in text
    assert "needs nnU-Net only" in text


def test_student_or_teacher_on_request(model, tmp_path):
    before = read(model)
    export_model(model, tmp_path / "s", "student", ["all"])
    export_model(model, tmp_path / "t", "teacher", ["all"])
    assert_same(read(tmp_path / "s")["network_weights"], before["ssl_state"]["student"])
    assert_same(read(tmp_path / "t")["network_weights"], before["network_weights"])
    assert not (tmp_path / "s" / "fold_0").exists()
    assert read(tmp_path / "s")["init_args"]["device"] == torch.device("cpu")
    assert "ssl_state" not in read(tmp_path / "s")


def test_network_of_its_own_says_what_the_receiver_needs(model, tmp_path):
    def own(checkpoint):
        checkpoint["trainer_name"] = "SSLTrainerMean"
        weights = checkpoint["network_weights"]
        checkpoint["network_weights"] = {f"a.{k}": v for k, v in weights.items()}

    edit(model, own)
    assert "receiver needs nnunet_ssl" in export_model(model, tmp_path / "mean", folds=["all"])
    assert read(tmp_path / "mean")["trainer_name"] == "SSLTrainerMean"
    text = export_model(model, tmp_path / "student", "student", ["all"])
    assert read(tmp_path / "student")["trainer_name"] == "nnUNetTrainer"
    assert "needs nnU-Net only" in text


def test_other_checkpoint_gets_the_default_name(model, tmp_path):
    final = model / "fold_all" / "checkpoint_final.pth"
    final.rename(final.with_name("checkpoint_best.pth"))
    export_model(model, tmp_path / "out", checkpoint="checkpoint_best.pth")
    assert [p.name for p in (tmp_path / "out").glob("fold_*")] == ["fold_all"]
    assert (tmp_path / "out" / "fold_all" / "checkpoint_final.pth").is_file()


def cut_short(model):
    path = model / "fold_all" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("harm", "options", "message"),
    [
        (lambda m: (m / "plans.json").unlink(), {}, r"plans\.json is missing.*-i"),
        (lambda m: None, {"checkpoint": "x.pth"}, r"no fold_X/x\.pth.*-chk"),
        (lambda m: None, {"folds": ["3"]}, r"fold_3.*does not exist.*-f 0 all"),
        (cut_short, {}, r"checkpoint_final\.pth cannot be read.*cut short"),
        (
            lambda m: edit(m, lambda c: c.pop("ssl_state")),
            {"network": "student"},
            r"checkpoint_final\.pth has no semi-supervised state.*Leave --network out",
        ),
        (
            lambda m: edit(m, lambda c: c["ssl_state"]["companions"].clear()),
            {"network": "teacher"},
            r"holds no network 'teacher', only: student",
        ),
        (
            lambda m: edit(m, lambda c: c["ssl_state"]["student"].popitem()),
            {"network": "student"},
            r"'student' cannot predict",
        ),
    ],
)
def test_bad_input_names_the_fix_and_leaves_nothing(model, tmp_path, harm, options, message):
    harm(model)
    with pytest.raises(UserError, match=message):
        export_model(model, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_existing_folder_is_kept(model, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert cli.main(["export", "-i", str(model), "-o", str(tmp_path / "out")]) == 2
    assert "exists. Delete it" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_full_disk_leaves_nothing(model, tmp_path, monkeypatch):
    def full(checkpoint, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk is full"):
        export_model(model, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
