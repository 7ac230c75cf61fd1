"""Package nnunet_ssl; `trainers/` and `dataset_conversion/` are installed as its subpackages."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
version: dict = {}
exec((HERE / "nnunet_ssl" / "version.py").read_text(), version)

setup(
    name="nnunet-ssl",
    version=version["__version__"],
    description="Semi-supervised medical image segmentation as an nnU-Net v2 plugin",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The nnunet_ssl developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["nnunet_ssl", "nnunet_ssl.*"]),
        "nnunet_ssl.discovery",  # no __init__.py: nnU-Net reads its files as top-level modules
        "nnunet_ssl.trainers",
        "nnunet_ssl.dataset_conversion",
    ],
    package_dir={
        "nnunet_ssl": "nnunet_ssl",
        "nnunet_ssl.trainers": "trainers",
        "nnunet_ssl.dataset_conversion": "dataset_conversion",
    },
    package_data={
        "nnunet_ssl.dataset_conversion": ["lists/*"],
        "nnunet_ssl.evaluation": ["*.j2"],
        "nnunet_ssl.offline": ["*.j2"],
    },
    install_requires=[
        version["nnunet_range"](),
        "torch",
        "numpy",
        "SimpleITK",
        "batchgenerators",
        "dynamic-network-architectures",
        "filelock",
        "h5py",
        "jinja2",
        "matplotlib",
        "pandas",
        "pyyaml",
        "scipy",
        "timm",
        "tqdm",
    ],
    extras_require={
        "slurm": ["submitit"],
        "mamba": ["mamba-ssm"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "codespell",
            "pre-commit",
            "medpy",
            "submitit",
        ],
    },
    entry_points={"console_scripts": ["nnunet_ssl=nnunet_ssl.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
