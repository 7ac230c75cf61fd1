"""The command `nnunet_ssl`: thin sub-commands around the package and nnU-Net's own commands.

Heavy modules are imported inside the sub-commands, so that `--help` answers at once.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.version import __version__, check_nnunet_version

DEFAULT_TRAINER = "SSLTrainer"
DEFAULT_PLANS = "nnUNetPlans"

OVERVIEW = """\
nnunet_ssl trains nnU-Net with few annotated scans and many without masks.

your own data in four commands:
  eval "$(nnunet_ssl env)"                           # tell nnU-Net where our trainers are
  nnunet_ssl doctor -d 4                             # is everything set up?
  nnunet_ssl plan_and_preprocess -d 4 -c 3d_fullres  # imagesTr and imagesUn
  nnunet_ssl train 4 3d_fullres all                  # or: nnUNetv2_train 4 3d_fullres all -tr ...
"""

# nnU-Net's own arguments, declared for --help and to be read here; they are handed on as typed.
TRAIN_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("dataset", {"help": "id or name: 4 or Dataset004_Hippocampus"}),
    ("configuration", {"help": "2d, 3d_fullres or 3d_lowres"}),
    ("fold", {"help": "0 to 4, or all: train on every annotated case"}),
    ("-tr", {"help": f"trainer, with settings if wanted: NAME+num_epochs=100 ({DEFAULT_TRAINER})"}),
    ("-p", {"default": DEFAULT_PLANS, "help": "plans (%(default)s)"}),
    ("-device", {"default": "cuda", "help": "cuda, cpu or mps (%(default)s)"}),
    ("--c", {"action": "store_true", "help": "continue from the latest checkpoint"}),
    ("--val", {"action": "store_true", "help": "only run the final validation"}),
    ("--val_best", {"action": "store_true", "help": "validate checkpoint_best"}),
    ("--npz", {"action": "store_true", "help": "keep the probabilities of the final validation"}),
    ("-pretrained_weights", {"help": "checkpoint to start from"}),
    ("-num_gpus", {"default": "1", "help": "number of GPUs (%(default)s)"}),
    ("--disable_checkpointing", {"action": "store_true", "help": "save nothing"}),
]
PREDICT_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("-i", {"required": True, "help": "folder with images, named CASE_0000.nii.gz"}),
    ("-o", {"required": True, "help": "folder for the segmentations"}),
    ("-d", {"required": True, "help": "data set id or name"}),
    ("-c", {"required": True, "help": "2d, 3d_fullres or 3d_lowres"}),
    ("-f", {"nargs": "+", "default": list("01234"), "help": "folds that were trained, or all"}),
    ("-tr", {"help": f"trainer name as given to train ({DEFAULT_TRAINER})"}),
    ("-p", {"default": DEFAULT_PLANS, "help": "plans (%(default)s)"}),
    ("-device", {"default": "cuda", "help": "cuda, cpu or mps (%(default)s)"}),
    ("-chk", {"help": "checkpoint name (checkpoint_final.pth)"}),
    ("-step_size", {"help": "step of the sliding window, in patches (0.5)"}),
    ("--disable_tta", {"action": "store_true", "help": "no mirroring: faster, less accurate"}),
    ("--save_probabilities", {"action": "store_true", "help": "also write probabilities"}),
    ("--continue_prediction", {"action": "store_true", "help": "skip cases already predicted"}),
    ("--not_on_device", {"action": "store_true", "help": "keep results in RAM (large images)"}),
    ("--verbose", {"action": "store_true", "help": "tell more"}),
    ("--disable_progress_bar", {"action": "store_true", "help": "no progress bar"}),
    ("-npp", {"help": "processes for preprocessing (3)"}),
    ("-nps", {"help": "processes for writing (3)"}),
    ("-num_parts", {"help": "split the work into this many parts"}),
    ("-part_id", {"help": "which part this run does"}),
    ("-prev_stage_predictions", {"help": "predictions of the previous stage of a cascade"}),
]


def build_parser() -> argparse.ArgumentParser:
    """The parser with all sub-commands; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="nnunet_ssl",
        description=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nnunet_ssl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str,
        run: Callable[[argparse.Namespace], int | None],
        text: str,
        example: str,
        add_help: bool = True,
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=f"{text}.\n\nexample: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )
        sub.set_defaults(run=run)
        return sub

    example = 'eval "$(nnunet_ssl env)"'
    add("env", run_env, "print the line that lets nnU-Net find our trainers", example)

    sub = add("doctor", run_doctor, "check the set-up and say the fixes", "nnunet_ssl doctor -d 4")
    sub.add_argument("-d", metavar="ID", help="also check this data set (id or name)")
    sub.add_argument("-c", metavar="CONFIG", help="only this configuration, and it must be ready")
    sub.add_argument("-p", metavar="PLANS", default=DEFAULT_PLANS, help="plans (%(default)s)")

    sub = add("list", run_list, "show the trainers", f"nnunet_ssl list {DEFAULT_TRAINER}")
    sub.add_argument("name", nargs="?", help="show the settings of this trainer")

    sub = add(
        "split",
        run_split,
        "make a data set with few masks from a fully annotated one",
        "nnunet_ssl split -d 4 -o 104 --labeled 4 --test 40",
    )
    sub.add_argument("-d", required=True, metavar="ID", help="the fully annotated data set")
    sub.add_argument("-o", required=True, type=int, metavar="NEWID", help="id of the new data set")
    sub.add_argument(
        "--labeled", required=True, type=int, metavar="N", help="cases (groups) keeping masks"
    )
    sub.add_argument(
        "--list",
        metavar="FILE",
        help="order of the cases, one name a line (that of the conversion, else by name)",
    )
    sub.add_argument(
        "--draw",
        type=int,
        default=0,
        metavar="K",
        help="0: the order as it is (default); above 0: seed of a shuffle",
    )
    sub.add_argument(
        "--test", metavar="N|FILE", help="last N cases (groups), or those named in FILE: test set"
    )
    sub.add_argument(
        "--groups",
        metavar="FILE",
        help="CSV case,group: numbers count groups (patients), which stay whole (those of the "
        "conversion, if any)",
    )
    sub.add_argument("--copy", action="store_true", help="copy files instead of linking them")

    sub = add(
        "plan_and_preprocess",
        run_plan_and_preprocess,
        "plan with nnU-Net's planner and preprocess imagesTr and imagesUn",
        "nnunet_ssl plan_and_preprocess -d 4 -c 2d 3d_fullres",
    )
    sub.add_argument("-d", required=True, metavar="ID", help="data set id or name")
    sub.add_argument(
        "-c",
        nargs="+",
        default=["2d", "3d_fullres", "3d_lowres"],
        metavar="CONFIG",
        help="configurations to preprocess; those the plans lack are skipped (%(default)s)",
    )
    sub.add_argument(
        "--plan-on",
        choices=["all", "labeled"],
        default="all",
        help="plan with the shapes of all scans, or of the annotated ones only (%(default)s)",
    )
    sub.add_argument(
        "--keep_plans", action="store_true", help="keep existing plans, only preprocess"
    )
    sub.add_argument("-pl", default="ExperimentPlanner", help="planner class (%(default)s)")
    sub.add_argument("-gpu_memory_target", type=float, metavar="GB", help="GPU memory to plan for")
    sub.add_argument(
        "-preprocessor_name", default="DefaultPreprocessor", help="preprocessor (%(default)s)"
    )
    sub.add_argument(
        "-overwrite_target_spacing",
        nargs=3,
        type=float,
        metavar="MM",
        help="target spacing of 3d_fullres",
    )
    sub.add_argument("-overwrite_plans_name", metavar="NAME", help="name of the new plans")
    sub.add_argument("-npfp", type=int, metavar="N", help="processes for the fingerprint")
    sub.add_argument("-np", type=int, metavar="N", help="processes for preprocessing")

    sub = add(
        "train",
        run_train,
        "nnU-Net's training, with an estimate of time and memory first; nnU-Net's own arguments",
        "nnunet_ssl train 4 3d_fullres all -tr SSLTrainer+num_epochs=100",
    )
    for name, options in TRAIN_OPTIONS:
        sub.add_argument(name, **options)

    sub = add(
        "spcl",
        run_spcl,
        "pre-train an encoder on all images without their masks, then train from it",
        "nnunet_ssl spcl 104 2d all",
    )
    sub.add_argument("dataset", help="id or name: 4 or Dataset004_Hippocampus")
    sub.add_argument("configuration", help="2d, 3d_fullres or 3d_lowres")
    sub.add_argument("fold", help="0 to 4, or all: train on every annotated case")
    sub.add_argument(
        "-pre",
        metavar="NAME",
        help="trainer of the first stage, with settings if wanted (SSLTrainerSPCLPretrain, with "
        "the settings of -tr that it knows)",
    )
    sub.add_argument(
        "-tr",
        default="SSLTrainerSPCL",
        metavar="NAME",
        help="trainer that starts from it; any with one network (%(default)s)",
    )
    sub.add_argument("-p", default=DEFAULT_PLANS, metavar="PLANS", help="plans (%(default)s)")
    sub.add_argument("-device", default="cuda", help="cuda, cpu or mps (%(default)s)")
    sub.add_argument(
        "--c", action="store_true", help="go on: a finished first stage is not run again"
    )

    sub = add(
        "pseudo_label",
        run_pseudo_label,
        "label scans without masks, train on the stable ones, and again",
        "nnunet_ssl pseudo_label -d 104 -c 3d_fullres -o 105",
    )
    sub.add_argument("-d", required=True, metavar="ID", help="data set id or name")
    sub.add_argument("-c", required=True, metavar="CONFIG", help="2d, 3d_fullres or 3d_lowres")
    sub.add_argument(
        "-o",
        required=True,
        type=int,
        metavar="NEWID",
        help="id of the new data set; further rounds take the ids after it",
    )
    sub.add_argument("--rounds", type=int, default=2, metavar="N", help="at most (%(default)s)")
    sub.add_argument(
        "-tr",
        default=DEFAULT_TRAINER,
        metavar="NAME",
        help="trainer of all models, with settings if wanted (%(default)s)",
    )
    sub.add_argument("-p", default=DEFAULT_PLANS, metavar="PLANS", help="plans (%(default)s)")
    sub.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="start from this finished model; default: train one, or take the finished one of -tr",
    )
    sub.add_argument(
        "--folds",
        nargs="+",
        default=["all"],
        metavar="FOLD",
        help="all: no validation; numbers: each fold gets pseudo-labels of its own (%(default)s)",
    )
    sub.add_argument(
        "--joint",
        action="store_true",
        help="the folds label together, and fold all is trained on it: no validation",
    )
    sub.add_argument(
        "--drop",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the cases, the least stable ones, stay without mask (%(default)s)",
    )
    sub.add_argument(
        "--shape",
        nargs="+",
        default=[],
        metavar="CHECK",
        help="is a mask plausible? largest, ellipse, volume, or module:function",
    )
    sub.add_argument(
        "--hidden",
        type=Path,
        metavar="FOLDER",
        help="masks of scans without masks, where there are some; for the report alone",
    )
    sub.add_argument("-device", default="cuda", help="cuda, cpu or mps (%(default)s)")
    sub.add_argument(
        "--disable_tta", action="store_true", help="no mirroring: faster, less accurate"
    )
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="tasks at a time")
    sub.add_argument(
        "--parts",
        type=int,
        metavar="N",
        help="tasks that the prediction of a fold is spread over (as many as --workers)",
    )
    sub.add_argument(
        "--launcher", choices=["local", "slurm"], default="local", help="(%(default)s)"
    )

    sub = add(
        "predict",
        run_predict,
        "nnU-Net's prediction; nnU-Net's own arguments",
        "nnunet_ssl predict -i images -o segmentations -d 4 -c 3d_fullres -f all",
    )
    for name, options in PREDICT_OPTIONS:
        sub.add_argument(name, **options)

    sub = add(
        "export",
        run_export,
        "write a slim model folder that predicts with nnU-Net alone",
        "nnunet_ssl export -i SSLTrainer__nnUNetPlans__3d_fullres -o to_share",
    )
    sub.add_argument("-i", required=True, metavar="MODEL_FOLDER", help="holds plans.json, fold_X")
    sub.add_argument("-o", required=True, metavar="OUT", help="folder to make")
    sub.add_argument(
        "--network",
        choices=["student", "teacher"],
        help="which network; default: the one the trainer predicts with",
    )
    sub.add_argument("-f", nargs="+", metavar="FOLD", help="folds; default: all that are there")
    sub.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (%(default)s)")

    sub = add(
        "convert",
        run_convert,
        "turn an original download into a data set with annotated, unannotated and test cases",
        "nnunet_ssl convert LA -i 2018LA_Seg -d 11 --labeled 8",
        add_help=False,  # the scripts have their own
    )

    sub = add(
        "evaluate",
        run_evaluate,
        "compare segmentations with annotations",
        "nnunet_ssl evaluate -g labelsTs -p segmentations -o scores",
    )
    sub.add_argument("-g", required=True, type=Path, metavar="FOLDER", help="annotations")
    sub.add_argument("-p", required=True, type=Path, metavar="FOLDER", help="segmentations")
    sub.add_argument("-o", required=True, type=Path, metavar="OUT", help="folder for the scores")
    labels = sub.add_mutually_exclusive_group()
    labels.add_argument(
        "--labels",
        nargs="+",
        type=int,
        metavar="N",
        help="all values in the masks but 0; each is scored",
    )
    labels.add_argument(
        "--dataset-json",
        type=Path,
        metavar="FILE",
        help="names, regions and ignore label; default: dataset.json beside the segmentations",
    )
    sub.add_argument(
        "--units",
        choices=["mm", "voxel", "both"],
        default="mm",
        help="unit of distances (%(default)s)",
    )
    sub.add_argument(
        "--tolerance", type=float, default=1.0, help="of NSD, in that unit (%(default)s)"
    )
    sub.add_argument(
        "--circumference",
        nargs="+",
        default=(),
        metavar="CLASS",
        help="compare the circumference of these classes as well, by a fitted ellipse, in mm; "
        "fetal heads in 2D",
    )
    sub.add_argument("-np", type=int, metavar="N", help="processes; default: one per core")

    sub = add(
        "benchmark",
        run_benchmark,
        "run the experiments of a spec, each beside its supervised twin",
        "nnunet_ssl benchmark benchmarks/specs/la.yaml -o la_runs",
    )
    sub.add_argument("spec", type=Path, metavar="SPEC.yaml", help="what to run")
    sub.add_argument("-o", required=True, type=Path, metavar="DIR", help="folder of the runs")
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time")
    sub.add_argument(
        "--launcher", choices=["local", "slurm"], default="local", help="(%(default)s)"
    )
    sub.add_argument("--only", nargs="+", metavar="PART", help="cells named like one of these")
    sub.add_argument("--dry-run", action="store_true", help="only tell what would run")

    sub = add(
        "compare",
        run_compare,
        "cross-validate a trainer and its supervised twin on your annotated cases",
        "nnunet_ssl compare -d 4 -c 3d_fullres -o comparison",
    )
    sub.add_argument("-d", required=True, metavar="ID", help="data set id or name")
    sub.add_argument("-c", required=True, metavar="CONFIG", help="2d, 3d_fullres or 3d_lowres")
    sub.add_argument(
        "-tr", nargs="+", default=[DEFAULT_TRAINER], metavar="NAME", help="(%(default)s)"
    )
    sub.add_argument("-p", default=DEFAULT_PLANS, metavar="PLANS", help="plans (%(default)s)")
    sub.add_argument("-o", type=Path, metavar="DIR", help="default: compare_ID_CONFIG")
    sub.add_argument("-device", default="cuda", help="cuda, cpu or mps (%(default)s)")
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="trainings at a time")
    sub.add_argument("--yes", action="store_true", help="do not ask after the estimate of time")

    sub = add(
        "report",
        run_report,
        "make one HTML page from a folder of runs",
        "nnunet_ssl report la_runs -o report.html",
    )
    sub.add_argument("folder", type=Path, metavar="DIR", help="folder of benchmark or compare")
    sub.add_argument("-o", required=True, type=Path, metavar="FILE", help="page to write")

    sub = add(
        "demo",
        run_demo,
        "make a small 3D data set, train with and without its unlabelled scans, compare",
        "nnunet_ssl demo -o demo_run",
    )
    sub.add_argument("-o", metavar="FOLDER", default="demo_run", help="work folder (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the data set (%(default)s)")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    return parser


def run_env(args: argparse.Namespace) -> None:
    """Print the export line, for `eval` or a shell's start file."""
    from nnunet_ssl.doctor import export_line

    print(export_line())


def run_doctor(args: argparse.Namespace) -> int:
    """Print the checks; 1 if one failed."""
    from nnunet_ssl import doctor

    return doctor.run_doctor(args.d, args.c, args.p)


def run_list(args: argparse.Namespace) -> None:
    """Print the table of trainers, or one trainer's settings."""
    from nnunet_ssl import naming

    if args.name:
        print(describe_trainer(args.name, naming.resolve(args.name)))
    else:
        print(trainer_table(naming.trainer_classes()))


def trainer_table(classes: dict[str, Any]) -> str:
    """One line per trainer, columns aligned."""
    yes_no = {True: "yes", False: "no"}
    rows = [
        (
            *("trainer", "method", "dims", "networks", "predicts with"),
            *("regions", "ignore", "DDP", "step", "paper"),
        )
    ]
    for name, cls in sorted(classes.items()):
        rows.append(
            (
                name,
                cls.method,
                "/".join(cls.dims),
                cls.networks,
                (cls.deployed or cls.deploy) + ("" if cls.deploys_stock else " (needs nnunet_ssl)"),
                yes_no[cls.supports_regions],
                yes_no[cls.supports_ignore],
                yes_no[cls.supports_ddp],
                f"{cls.step_cost:.3g}x",
                cls.paper,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    lines.append("\nstep: cost of a training step, in steps of the supervised twin.")
    lines.append("Settings of one trainer: nnunet_ssl list NAME")
    return "\n".join(lines)


def describe_trainer(name: str, cls: Any) -> str:
    """What a trainer does and its settings with their defaults."""
    lines = [name, "", (cls.__doc__ or "").strip().split("\n\n")[0], f"Source: {cls.paper}"]
    lines += ["", "settings:"]
    settings = cls.settings()
    width = max(map(len, settings), default=0)
    lines += [f"  {key.ljust(width)}  {value!r}" for key, value in settings.items()]
    lines.append(f"\nexample: -tr {name.split('+')[0]}+num_epochs=100")
    if cls.uses_unlabeled and cls.twin:
        lines.append(f"its supervised twin: -tr {cls.twin}")
    return "\n".join(lines)


def run_split(args: argparse.Namespace) -> None:
    """Make the data set and say what comes next."""
    from nnunet_ssl.planning.splits import read_groups, split_dataset

    split_dataset(
        dataset_id(args.d),
        args.o,
        labeled=args.labeled,
        draw=args.draw,
        list_file=Path(args.list) if args.list else None,
        test=int(args.test) if args.test and args.test.isdigit() else args.test and Path(args.test),
        groups=read_groups(Path(args.groups)) if args.groups else None,
        follow_record=True,
        copy=args.copy,
    )
    print(f"Next: nnunet_ssl plan_and_preprocess -d {args.o} -c 2d 3d_fullres")


def run_plan_and_preprocess(args: argparse.Namespace) -> None:
    """Plan and preprocess."""
    check_nnunet_version()
    from nnunet_ssl.planning.api import plan_and_preprocess

    plan_and_preprocess(
        dataset_id(args.d),
        args.c,
        planner=args.pl,
        plan_on=args.plan_on,
        gpu_memory_target=args.gpu_memory_target,
        preprocessor=args.preprocessor_name,
        overwrite_target_spacing=args.overwrite_target_spacing,
        overwrite_plans_name=args.overwrite_plans_name,
        num_processes=args.np,
        fingerprint_processes=args.npfp,
        keep_plans=args.keep_plans,
    )


def dataset_id(name: str) -> int:
    """The number in `4` or `Dataset004_Hippocampus`."""
    digits = name[7:10] if name.startswith("Dataset") else name
    if not digits.isdigit():
        raise UserError(f"-d {name}: not a data set. Give its number (4) or DatasetXXX_NAME.")
    return int(digits)


def run_train(args: argparse.Namespace) -> None:
    """Print the estimate, run nnU-Net's training, print the command that predicts."""
    trainer = prepare(args)
    plans = plans_of(args)
    if trainer is not None and not args.val:
        from nnunet_ssl.estimate import estimate

        trainer.refuse_unsupported(*plans)

        print(estimate(args.dataset, args.configuration, args.p, args.tr, args.device), flush=True)
    from nnunetv2.run.run_training import run_training_entry

    call_nnunet("nnUNetv2_train", args, run_training_entry)
    print_predict_command(
        trainer, args, ["INPUT", "OUTPUT"], args.dataset, args.configuration, [args.fold]
    )


def plans_of(args: argparse.Namespace) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return plans, configuration and dataset.json of a training.

    Raises:
        UserError: no such data set, plans or configuration.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    from nnunet_ssl.io import environment_folder
    from nnunet_ssl.planning.api import read_plans

    try:
        name = maybe_convert_to_dataset_name(args.dataset)
    except RuntimeError as error:
        raise UserError(
            f"No data set {args.dataset} below nnUNet_raw, nnUNet_preprocessed or nnUNet_results. "
            f"Give its number (4) or DatasetXXX_NAME."
        ) from error
    base = environment_folder("nnUNet_preprocessed") / name
    plans = read_plans(base, args.p, args.configuration)
    content = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    return plans, args.configuration, content


def run_spcl(args: argparse.Namespace) -> None:
    """Run both stages, print the command that predicts."""
    trainer = prepare(args)
    from nnunet_ssl.estimate import measure_elsewhere
    from nnunet_ssl.naming import resolve
    from nnunet_ssl.two_stages import train_in_two_stages, with_settings_of

    first = args.pre or with_settings_of(args.tr, "SSLTrainerSPCLPretrain")
    for name in (first, args.tr):
        resolve(name)
    plans_of(args)
    place = args.dataset, args.configuration, args.p
    try:
        told = measure_elsewhere(*place, [first, args.tr], args.device)
        print(*(f"{name}: {line}" for name, (_, line) in told.items()), sep="\n", flush=True)
    except UserError as error:
        print(f"no estimate: {error}", flush=True)
    train_in_two_stages(
        args.dataset,
        args.configuration,
        args.fold,
        first=first,
        second=args.tr,
        plans=args.p,
        device=args.device,
        resume=args.c,
    )
    print_predict_command(
        trainer, args, ["INPUT", "OUTPUT"], args.dataset, args.configuration, [args.fold]
    )


def run_pseudo_label(args: argparse.Namespace) -> int:
    """Run the rounds of self-training; 1 if no pseudo-label was good enough."""
    check_nnunet_version()
    from nnunet_ssl.offline.command import pseudo_label

    return pseudo_label(
        dataset_id(args.d),
        args.c,
        args.o,
        trainer=args.tr,
        plans=args.p,
        rounds=args.rounds,
        folds=args.folds,
        joint=args.joint,
        model=args.model,
        drop=args.drop,
        shapes=args.shape,
        device=args.device,
        mirroring=not args.disable_tta,
        workers=args.workers,
        parts=args.parts,
        launcher=args.launcher,
        hidden=args.hidden,
    )


def run_predict(args: argparse.Namespace) -> None:
    """Run nnU-Net's prediction, print the stock command that does the same."""
    trainer = prepare(args)
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    require_trained_model(args)
    call_nnunet("nnUNetv2_predict", args, predict_entry_point)
    print_predict_command(trainer, args, [args.i, args.o], args.d, args.c, args.f)


def require_trained_model(args: argparse.Namespace) -> None:
    """Raise UserError if there is no model to predict with."""
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    try:
        model = Path(get_output_folder(args.d, args.tr, args.p, args.c))
    except (RuntimeError, ValueError) as error:  # unknown data set, or nnUNet_results unset
        raise UserError(str(error)) from error
    if not (model / "plans.json").is_file():
        raise UserError(
            f"No trained model in {model}. Give -d, -c, -tr and -p as in training, or train first: "
            f"nnunet_ssl train {args.d} {args.c} all -tr {args.tr}"
        )
    from nnunet_ssl.export import find_checkpoints

    find_checkpoints(model, args.f, args.chk or "checkpoint_final.pth")
    ending = json.loads((model / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    images = Path(args.i)
    if not any(images.glob(f"*_0000{ending}")):
        state = "holds no" if images.is_dir() else "does not exist. Give a folder with"
        raise UserError(f"{images} {state} images named CASE_0000{ending}.")


def prepare(args: argparse.Namespace) -> Any:
    """Set the default trainer and `nnUNet_extTrainer`; return the trainer class if it is ours.

    Raises:
        UserError: unsupported nnU-Net, unknown setting, or no GPU where one was asked for.
    """
    check_nnunet_version()
    import torch

    from nnunet_ssl import naming
    from nnunet_ssl.doctor import trainer_path

    if args.tr is None:
        args.tr = DEFAULT_TRAINER
        args.raw += ["-tr", DEFAULT_TRAINER]
    os.environ[naming.VARIABLE] = trainer_path()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda (the default): no CUDA GPU found here. Add: -device cpu")
    base = args.tr.split("+")[0]
    known = base.startswith(DEFAULT_TRAINER) or naming.find_trainer(base)
    return naming.resolve(args.tr) if known else None


def call_nnunet(command: str, args: argparse.Namespace, entry: Callable[[], None]) -> None:
    """Call an entry point of nnU-Net in this process with the arguments as they were typed."""
    before = sys.argv
    sys.argv = [command, *args.raw]
    try:
        entry()
    finally:
        sys.argv = before


def print_predict_command(
    trainer: Any,
    args: argparse.Namespace,
    folders: Sequence[str],
    dataset: str,
    configuration: str,
    folds: Sequence[str],
) -> None:
    """Print the stock command that predicts with this model."""
    command = ["nnUNetv2_predict", "-d", dataset, "-c", configuration, "-tr", args.tr]
    command += ["-p", args.p, "-f", *folds, "-i", folders[0], "-o", folders[1]]
    if args.device != "cuda":
        command += ["-device", args.device]
    if getattr(args, "chk", None):
        command += ["-chk", args.chk]
    print("\nPredict with stock nnU-Net:")
    if trainer is not None and not trainer.deploys_stock:
        from nnunet_ssl.doctor import export_line

        print(f"  {export_line()}")
    print(f"  {shlex.join(command)}", flush=True)


def run_export(args: argparse.Namespace) -> None:
    """Write the slim model folder."""
    from nnunet_ssl.export import export_model

    print(export_model(args.i, args.o, args.network, args.f, args.chk))


def run_convert(args: argparse.Namespace) -> int:
    """Hand over to the data set's script."""
    from nnunet_ssl import dataset_conversion  # type: ignore[attr-defined]  # mapped by setup.py

    return dataset_conversion.main(args.raw)


def run_evaluate(args: argparse.Namespace) -> None:
    """Score a folder of segmentations and print the table."""
    from nnunet_ssl.evaluation.evaluate import evaluate_folder

    evaluate_folder(
        args.g,
        args.p,
        args.o,
        labels=args.labels,
        dataset_json=args.dataset_json,
        units=args.units,
        tolerance=args.tolerance,
        circumference=args.circumference,
        processes=args.np,
    )


def run_benchmark(args: argparse.Namespace) -> int:
    """Run the cells of a spec; 1 if one failed."""
    check_nnunet_version()
    from nnunet_ssl.evaluation.benchmark import run_benchmark

    return run_benchmark(
        args.spec,
        args.o,
        workers=args.workers,
        launcher=args.launcher,
        only=args.only,
        dry_run=args.dry_run,
    )


def run_compare(args: argparse.Namespace) -> int:
    """Cross-validate trainers beside their twins; 1 if a training failed."""
    check_nnunet_version()
    from nnunet_ssl.evaluation.compare import compare

    return compare(
        dataset_id(args.d),
        args.c,
        args.tr,
        args.o or Path(f"compare_{args.d}_{args.c}"),
        plans=args.p,
        device=args.device,
        workers=args.workers,
        ask=not args.yes,
    )


def run_report(args: argparse.Namespace) -> None:
    """Write the page."""
    from nnunet_ssl.evaluation.report import write_report

    write_report(args.folder, args.o)
    print(args.o)


def run_demo(args: argparse.Namespace) -> None:
    """Run the demo."""
    check_nnunet_version()
    from nnunet_ssl import demo

    demo.run_demo(Path(args.o), args.seed, args.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if it worked, 1 if the doctor found a fault, 2 for bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown and args.command not in ("train", "predict", "convert"):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.raw = argv[1:]  # what newer options nnU-Net has, it gets
    try:
        return args.run(args) or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
