"""Convert a Hugging Face folder for OpenVINO: float32, or weights compressed to int8.

    python prepare_openvino.py MODEL FOLDER --precision int8
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nncf
import openvino

_OFFLINE = {"HF_HUB_OFFLINE": "1", "OPENVINO_TELEMETRY": "0", "DO_NOT_TRACK": "1"}


def main() -> None:
    """Export in float32, and compress that if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", choices=("f32", "int8"), default="f32")
    args = parser.parse_args()
    export(args.model, args.folder)
    if args.precision == "int8":
        compress(args.folder)


def export(model: Path, folder: Path) -> None:
    """Write the model and its tokenizer as OpenVINO IR."""
    program = Path(sys.executable).with_name("optimum-cli")
    options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    argv = [str(program), "export", "openvino", "-m", str(model), *options, str(folder)]
    subprocess.run(argv, check=True, env={**os.environ, **_OFFLINE})


def compress(folder: Path) -> None:
    """Replace all weights, head and embedding included, by int8 with a scale and a zero point per output."""
    small = folder / "int8"
    small.mkdir()
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(compressed, small / "openvino_model.xml", compress_to_fp16=False)
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (small / name).replace(folder / name)
    shutil.rmtree(small)


if __name__ == "__main__":
    main()
