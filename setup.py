"""What pyproject.toml cannot say: the front-ends of tools/ and launch/ and ds_configs/ are installed inside the package.

Each front-end becomes a console command, `mlpmem-` and its name with hyphens; see mlpmem_ds/commands.py.
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("tools", "launch")
root = Path(__file__).parent
names = sorted(path.stem.replace("_", "-") for folder in FOLDERS for path in (root / folder).glob("[!_]*.py"))

setup(
    packages=[
        *find_packages(include=["mlpmem_ds*"]),
        *(f"mlpmem_ds.{folder}" for folder in FOLDERS),
        "mlpmem_ds.tools.benchmarks",
        "mlpmem_ds.ds_configs",
    ],
    package_dir={f"mlpmem_ds.{folder}": folder for folder in (*FOLDERS, "ds_configs")},
    package_data={"mlpmem_ds": ["py.typed", "formats/README.md"], "mlpmem_ds.ds_configs": ["*.json", "README.md"]},
    entry_points={"console_scripts": [f"mlpmem-{name} = mlpmem_ds.commands:main" for name in names]},
)
