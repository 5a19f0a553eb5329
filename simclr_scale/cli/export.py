"""``simclr-scale export``: an encoder in the format of another library."""

from simclr_scale.bundle import load_encoder
from simclr_scale.bundle.export import ExportFormat, export_encoder
from simclr_scale.cli.parsing import parser_of


def main(argv: list[str]) -> None:
    """``simclr-scale export``."""
    parser = parser_of("export", run_export, "--encoder ENCODER --format FORMAT --output PATH")
    run_export(**vars(parser.parse_args(argv)))


def run_export(encoder: str, format: ExportFormat, output: str) -> None:
    """Write an encoder in the format of another library, whose features are compared with ours first.

    Args:
        encoder: a run, a bundle, a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS.
        format: timm (a folder), torchvision (a state dict), onnx or torch-export (a .pt2 file).
        output: folder or file to write; must not exist.
    """
    module, transform = load_encoder(encoder)
    exported = export_encoder(module, transform, format, output)
    print(f"{exported.path}: the features are ours to {exported.difference:.1g} of the largest\n")
    print(exported.usage)
