"""Trainer names with settings."""

import importlib
import pickle
import sys
import textwrap
import types

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.naming import discovery_folder, resolve, trainer_classes, variants
from nnunet_ssl.trainers import SSLTrainer, SSLTrainerBCP, SSLTrainerMeanTeacher


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("num_epochs=100", "num_epochs", 100),
        ("initial_lr=0.5", "initial_lr", 0.5),
        ("initial_lr=1", "initial_lr", 1.0),
        ("initial_lr=1e-3", "initial_lr", 1e-3),
        ("probabilistic_oversampling=true", "probabilistic_oversampling", True),
        ("probabilistic_oversampling=True", "probabilistic_oversampling", True),
        ("enable_deep_supervision=false", "enable_deep_supervision", False),
        ("enable_deep_supervision=FALSE", "enable_deep_supervision", False),
        ("seed=3", "seed", 3),
        ("seed=None", "seed", None),
        ("seed=none", "seed", None),
        ("ema_decay=auto", "ema_decay", "auto"),
        ("ema_decay=0", "ema_decay", 0.0),
        ("ema_decay=0.99", "ema_decay", 0.99),
        ("deploy=student", "deploy", "student"),
        ("keep_at=0.4,0.7", "keep_at", (0.4, 0.7)),
        ("keep_at=(0.4, 0.7)", "keep_at", (0.4, 0.7)),
        ("keep_at=0.5", "keep_at", (0.5,)),
        ("keep_at=()", "keep_at", ()),
    ],
)
def test_settings_get_the_type_of_the_setting(setting, key, value):
    name = f"SSLTrainer+{setting}"
    made = resolve(name)
    assert getattr(made, key) == value
    assert type(getattr(made, key)) is type(value)
    assert made.__name__ == name and issubclass(made, SSLTrainer)
    assert {k for k, v in made.settings().items() if v != SSLTrainer.settings()[k]} <= {key}
    assert made.settings()[key] == value


def test_several_settings_and_the_default_stays_as_it_is():
    made = resolve("SSLTrainerBCP+num_epochs=7+largest_component=off+ema_decay=auto+seed=2")
    assert (made.num_epochs, made.largest_component, made.ema_decay, made.seed) == (
        7,
        "off",
        "auto",
        2,
    )
    assert SSLTrainerBCP.num_epochs != 7 and SSLTrainerBCP.seed is None
    assert resolve("SSLTrainerBCP") is SSLTrainerBCP
    assert made.__doc__ == SSLTrainerBCP.__doc__ and made.__module__ == SSLTrainerBCP.__module__


def test_the_same_name_is_the_same_class_whoever_asks():
    name = "SSLTrainerMeanTeacher+num_epochs=9"
    made = resolve(name)
    assert resolve(name) is made
    assert resolve(name, "nnunet_ssl.trainers") is made
    assert variants("nnunet_ssl.trainers")(name) is made
    assert resolve("SSLTrainerMeanTeacher+num_epochs=10") is not made
    assert pickle.loads(pickle.dumps(SSLTrainerMeanTeacher)) is SSLTrainerMeanTeacher


def fails_with(name, *words, module=None):
    with pytest.raises(UserError) as error:
        resolve(name) if module is None else resolve(name, module)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_unknown_trainer_lists_all():
    fails_with("SSLTrainerNone", "'SSLTrainerNone'", *trainer_classes())
    fails_with("SSLTrainerNone+seed=1", "'SSLTrainerNone'", *trainer_classes())


def test_unknown_setting_lists_the_valid_ones():
    fails_with("SSLTrainer+epochs=3", "SSLTrainer has no setting 'epochs'", "num_epochs=250")
    for key, value in SSLTrainer.settings().items():
        fails_with("SSLTrainer+epochs=3", f"{key}={value}")
    for key in ("uses_unlabeled", "views", "losses", "method", "__init__", "device"):
        fails_with(f"SSLTrainer+{key}=1", f"no setting {key!r}")


@pytest.mark.parametrize(
    ("setting", "takes"),
    [
        ("num_epochs=1.5", "a whole number"),
        ("num_epochs=1e3", "a whole number"),
        ("num_epochs=many", "a whole number"),
        ("num_epochs=true", "a whole number"),
        ("num_epochs=", "a whole number"),
        ("num_epochs=[1", "a whole number"),
        ("num_epochs={[]: 1}", "a whole number"),
        ("initial_lr=fast", "a number"),
        ("initial_lr=nan", "a number"),
        ("initial_lr=true", "a number"),
        ("initial_lr=None", "a number"),
        ("enable_deep_supervision=1", "true or false"),
        ("enable_deep_supervision=yes", "true or false"),
        ("seed=1.5", "a whole number or None"),
        ("ema_decay=slow", "a number or auto or None"),
        ("deploy=both", "teacher or student"),
        ("keep_at=0.5,late", "a number, or several separated by commas"),
    ],
)
def test_misfits_tell_the_value_and_what_fits(setting, takes):
    key = setting.split("=")[0]
    fails_with(
        f"SSLTrainer+{setting}",
        f"SSLTrainer: setting {setting} does not fit",
        takes,
        f"the default is {SSLTrainer.settings()[key]}",
    )


def test_settings_of_several_words():
    for text, value in {"partition": ("partition",), "phase,patient": ("phase", "patient")}.items():
        assert resolve(f"SSLTrainerSPCL+weights=1+meta_labels={text}").meta_labels == value
    fails_with("SSLTrainerSPCL+meta_labels=1,2", "a word, or several separated by commas")


@pytest.mark.parametrize("pairs", ["seed", "seed=1+seed=2", "seed=1+seed=1", "", "seed=1+", "+"])
def test_pairs_must_read_key_value_once(pairs):
    fails_with(f"SSLTrainer+{pairs}", "key=value, each key once", "SSLTrainer+num_epochs=100")


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("num_epochs=0", "at least 1"),
        ("num_iterations_per_epoch=-1", "at least 1"),
        ("save_every=11", "between 1 and 10"),
        ("initial_lr=0", "above 0"),
        ("seed=-1", "between 0 and 2^32 - 1"),
        ("seed=4294967296", "between 0 and 2^32 - 1"),
        ("initial_lr=1e999", "above 0 and finite"),
        ("keep_at=0.5,1.0", "fractions between 0 and 1"),
        ("ema_decay=1", "[0, 1)"),
        ("ema_decay=None", "a number or auto, since the method needs its teacher"),
        ("unsup_weight=-1.0", "0 or more"),
        ("brake_floor=0.0", "above 0"),
        ("ready_low=0.95", "low limits not above high ones"),
        ("warmup=1.0", "in [0, 1)"),
        ("rampup_end=0.05", "between warmup and 1, here from 0.1"),
    ],
)
def test_values_out_of_range(setting, rule):
    fails_with(f"SSLTrainer+{setting}", setting.split("=")[0], rule)


def test_no_teacher_means_that_the_student_predicts():
    fails_with("SSLTrainerSupervised+ema_decay=None", "deploy", "student, since ema_decay=None")
    made = resolve("SSLTrainerSupervised+ema_decay=None+deploy=student")
    assert made.ema_decay is None


# ---------------------------------------------------------------- a user's own trainers


@pytest.fixture
def own_trainers(tmp_path, monkeypatch):
    """A package `my_ssl` outside of ours, and the module that nnU-Net would find."""
    package = tmp_path / "my_ssl"
    package.mkdir()
    (package / "__init__.py").write_text(
        textwrap.dedent(
            """
            from nnunet_ssl.trainers import SSLTrainer

            __all__ = ["MyTrainer"]

            class MyTrainer(SSLTrainer):
                \"\"\"Mine.\"\"\"
                my_weight: float = 0.5
                my_steps = 4
            """
        )
    )
    (package / "bare.py").write_text("from nnunet_ssl.trainers import SSLTrainer\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = types.ModuleType("found")
    found.__getattr__ = variants("my_ssl")
    yield found
    for name in ("my_ssl", "my_ssl.bare"):
        sys.modules.pop(name, None)


def test_own_trainers_take_settings_too(own_trainers):
    name = "MyTrainer+my_weight=2+my_steps=8+num_epochs=3"
    made = getattr(own_trainers, name)
    mine = importlib.import_module("my_ssl").MyTrainer
    assert issubclass(made, mine) and made.__name__ == name and made.__module__ == "my_ssl"
    assert (made.my_weight, made.my_steps, made.num_epochs) == (2.0, 8, 3)
    assert getattr(own_trainers, name) is made
    fails_with("MyTrainer+weight=1", "MyTrainer has no setting", "my_weight=0.5", module="my_ssl")
    with pytest.raises(UserError, match="my_steps=x does not fit"):
        hasattr(own_trainers, "MyTrainer+my_steps=x")


def test_unknown_attributes_let_nnunets_finder_go_on(own_trainers):
    for name in ("Other", "Other+seed=1", "SSLTrainer+seed=1", "MyTrainer", "__path__", "+", ""):
        assert not hasattr(own_trainers, name)
    fails_with("SSLTrainer", "There are: MyTrainer", module="my_ssl")


def test_a_module_without_a_list_of_trainers_says_so(own_trainers):
    with pytest.raises(UserError, match=r"Module my_ssl\.bare has no __all__\. List"):
        resolve("SSLTrainer+seed=1", "my_ssl.bare")
    own_trainers.__getattr__ = variants("my_ssl.bare")
    with pytest.raises(UserError, match=r"my_ssl\.bare"):  # and not "no such trainer"
        hasattr(own_trainers, "SSLTrainer+seed=1")


def test_discovery_folder_holds_one_module_and_nothing_that_acts_on_import():
    assert [p.name for p in discovery_folder().glob("*.py")] == ["nnunet_ssl_trainers.py"]
    assert not (discovery_folder() / "setup.py").exists()
