"""Makes one virtual environment per library, so that no peer decides another one's versions.

    python benchmarks/peers/environments.py                 # all of them; about 5 GB
    python benchmarks/peers/environments.py captum dattri   # some of them

Every environment has the same torch, transformers and numpy. A peer itself is installed without its dependencies, and
then what it imports: three of the four ask for torchvision, which none of them needs here. An environment that is
finished holds a file `ready.json` with the versions that were installed, and is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE / ".environments"
REPOSITORY = HERE.parents[1]

COMMON = "torch transformers numpy scipy psutil accelerate safetensors"
# Library -> its own package, and what it imports beside COMMON.
PEERS = {
    "kronfluence": ("kronfluence==1.0.1", "einops einconv opt-einsum tqdm"),
    "dattri": ("dattri==0.3.0", "pyyaml tqdm pretty_midi"),
    "bergson": (
        "bergson==2.5.1",
        "datasets huggingface-hub jaxtyping jinja2 ml_dtypes natsort pandas peft petname pyarrow pyyaml "
        "simple-parsing tqdm",
    ),
    "captum": ("captum==0.9.0", "matplotlib packaging tqdm"),
}
# Installed without their dependencies, which would bring torchvision or another torch; bergson imports them.
BARE = {"bergson": ["torchopt", "bitsandbytes"]}


def python_of(library: str) -> Path:
    """The interpreter of a library's environment; hf_msif runs in the one that started the benchmark."""
    return Path(sys.executable) if library == "hf_msif" else ENVIRONMENTS / library / "bin" / "python"


def versions(library: str) -> dict[str, str]:
    """Package -> version in the environment of a library; empty where it was not made."""
    path = ENVIRONMENTS / library / "ready.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def make(library: str) -> None:
    """Makes the environment of a peer; a half-made one is made again from the start."""
    folder, constraints = ENVIRONMENTS / library, REPOSITORY / "constraints.txt"
    if versions(library):
        return print(f"{library}: ready")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{library}: making {folder.relative_to(REPOSITORY)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    package, needs = PEERS[library]
    subprocess.run([*install, "--constraint", constraints, *COMMON.split(), *needs.split()], check=True)
    subprocess.run([*install, "--no-deps", package, *BARE.get(library, [])], check=True)
    listed = subprocess.run([*install[:3], "list", "--format=json"], check=True, capture_output=True, text=True)
    installed = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    subprocess.run([folder / "bin" / "python", "-c", f"import {library}"], check=True)
    (folder / "ready.json").write_text(json.dumps(installed, indent=1))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="*", metavar="library", help=f"of {', '.join(PEERS)}; defaults to all")
    libraries = parser.parse_args().libraries or list(PEERS)
    if unknown := set(libraries) - set(PEERS):
        parser.error(f"got {sorted(unknown)}; expected some of {list(PEERS)}")
    failed = []
    for library in libraries:
        try:
            make(library)
        except subprocess.CalledProcessError as error:
            failed.append(library)
            print(f"{library}: no environment, since {' '.join(map(str, error.cmd[:4]))} … failed", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
