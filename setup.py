"""Carries `calibration/` in the wheel as `exlq.data`; everything else is declared in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["exlq", "exlq.*"]), "exlq.data"],
    package_dir={"exlq.data": "calibration"},
    package_data={
        "exlq": ["py.typed", "*.pyi"],
        "exlq.data": ["default.parquet", "README.md", "licences.txt"],
        "exlq.report": ["assets/*"],
    },
)
