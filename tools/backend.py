"""The build backend that pyproject.toml names: setuptools', with two rules of its own.

torch is asked for only where the user's environment has none (pip's build isolation would else
download the newest one for every build), and what an earlier build left of the Python files is
removed first, so that a deleted module does not come back in a wheel.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import build_config
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks passed on as they are)
    build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    installed = build_config.find_torch([*sys.path, *build_config.user_site_dirs()])
    try:
        return build_config.torch_to_require(installed)
    except build_config.BuildError as error:
        raise SystemExit(str(error)) from None


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    for stale in (build_config.ROOT / "build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
