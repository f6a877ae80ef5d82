"""Which packages there are; everything else about the distribution stands in setup.cfg.

Recipes and cards lie at the repository's top, where people look for them, and are installed as
folders of the package: setup.cfg can either find packages or map such folders, not both.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["mim_refiner_hf", "mim_refiner_hf.*"]),
        "mim_refiner_hf.model_cards",
        "mim_refiner_hf.recipes",
    ]
)
