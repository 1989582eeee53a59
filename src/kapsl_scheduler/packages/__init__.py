"""Models as files: the manifest, `.aimod` packages, raw model files. The public names; no logic."""

from kapsl_scheduler.packages.aimod import LoadedPackage, PackageLimits, build_package, load_model, load_package
from kapsl_scheduler.packages.manifest import (
    CronJobDef,
    HardwareRequirements,
    IntervalDef,
    Manifest,
    NamedTensor,
    parse_manifest,
)

__all__ = [
    "CronJobDef",
    "HardwareRequirements",
    "IntervalDef",
    "LoadedPackage",
    "Manifest",
    "NamedTensor",
    "PackageLimits",
    "build_package",
    "load_model",
    "load_package",
    "parse_manifest",
]
