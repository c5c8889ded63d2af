"""Compare an image's list of packages with what is installed. Runs in the image."""

import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


sbom = json.loads(Path(sys.prefix, "share/gradwire/sbom.cdx.json").read_text())
listed = {
    (normalized(component["name"]), component["version"])
    for component in sbom["components"]
}
installed = {
    (normalized(each.name), each.version) for each in distributions() if each.name
}
if sbom["bomFormat"] != "CycloneDX" or listed != installed:
    sys.exit(
        f"listed alone: {listed - installed}; installed alone: {installed - listed}"
    )
