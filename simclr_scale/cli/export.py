"""``simclr-scale export``: an encoder in the format of another library."""

from simclr_scale.bundle import load_encoder
from simclr_scale.bundle.export import ExportFormat, export_encoder
from simclr_scale.cli.parsing import OneLineErrors


def main(argv: list[str]) -> None:
    """``simclr-scale export``."""
    parser = OneLineErrors(
        prog="simclr-scale export",
        usage="%(prog)s --encoder ENCODER --format FORMAT --output PATH",
        description=(run_export.__doc__ or "").splitlines()[0],
    )
    parser.add_function_arguments(run_export, as_group=False)
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
