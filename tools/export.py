"""A run as one file for other programs: images in, probabilities and energies out.

    python -m tools.export runs/demo model.pt2    read by torch.export.load("model.pt2").module()
    python -m tools.export runs/demo model.onnx   needs the packages onnx and onnxscript

images (B, 3, size, size) float32, upright RGB, resized and normalised as data.Images does it, B up
to 1024 -> probabilities (B, C) of the run's score and energies (B, C, N), whose sigmoid is the
region of a run with --matching carl. model.pt2.json names categories, thresholds, size, mean, std.
"""
import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from support import UserError
from support.checkpoint import save_atomically, write_atomically
from support.cli import make_parser, run_command
from tools.predict import require_new
from tools.predictor import Predictor


class Exported(nn.Module):
    """Images to probabilities, with CLIP's image encoder and the text features inside."""

    def __init__(self, predictor):
        super().__init__()
        self.predictor, self.encoder, self.model = predictor, predictor.encoder, predictor.model

    def forward(self, images):
        f, x = self.encoder.encode(images)
        p, out = self.predictor.score_batch(f, x)
        return p, out.energy


@torch.no_grad()
def export(run, file, clip=None):
    """Writes `file`, .pt2 or .onnx, and `file`.json."""
    if file.suffix not in (".pt2", ".onnx"):
        raise UserError(f"expected a file that ends with .pt2 or .onnx, got {file}")
    require_new(file, "a file")
    if file.suffix == ".onnx":
        import onnxscript  # noqa: F401  told before the work where it is missing
    warnings.filterwarnings("ignore", "No complete tensor")  # channels-last weights: all right
    predictor = Predictor(run, device="cpu", places=clip and {"clip": clip})
    predictor.model.heads = None  # training's alone
    if predictor.cfg.matching == "carl":  # in one part: a batch of any size cannot be cut
        predictor.model.carl.at_once = sys.maxsize
    size, encoder = predictor.cfg.size, predictor.encoder
    module = Exported(predictor).eval().requires_grad_(False)
    batch = {"images": {0: torch.export.Dim("batch", max=1024)}}
    program = torch.export.export(module, (torch.zeros(2, 3, size, size),), dynamic_shapes=batch)

    if file.suffix == ".pt2":
        save_atomically(lambda buffer: torch.export.save(program, buffer), file)
    else:
        onnx = torch.onnx.export(program, input_names=["images"], verbose=False,
                                 output_names=["probabilities", "energies"])
        write_atomically(file, onnx.model_proto.SerializeToString())
    about = dict(categories=predictor.names, thresholds=predictor.threshold.tolist(), size=size,
                 mean=encoder.mean, std=encoder.std, grid=predictor.grid)
    write_atomically(Path(f"{file}.json"), json.dumps(about))
    print(f"wrote {file} and {file}.json")


def main(argv=None):
    parser = make_parser("tools.export", __doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("file", type=Path, help="where to write: .pt2 or .onnx")
    parser.add_argument("--clip", help="where its weights lie now, if they moved")
    return run_command(export, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
