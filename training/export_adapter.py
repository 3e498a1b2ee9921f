"""`python -m training.export_adapter NAME@VERSION --format merged|peft --out FOLDER`: a published adapter as a plain Hugging Face folder.

`merged` is a whole model that transformers loads; `peft` is the adapter alone, as PEFT loads it beside its base.
"""

import argparse
import shutil
import sys
from pathlib import Path

from hone.errors import HoneError, RegistryError
from hone.manifest import MANIFEST_FILE
from hone.storage import Home, new_folder
from training.trained import Trained, published

OURS = (MANIFEST_FILE, "recipe.json", "golden.safetensors", "evaluation.json", "verdict.json")
"""What of a published folder means nothing to other programs. The card, the report and the plots go along."""


def export_adapter(ref: str, *, form: str, out: Path, home: Home) -> None:
    """Write the folder, whole or not at all.

    Raises:
        RegistryError: it is there already, or the adapter has no such form. UnknownAdapterError, BaseModelError: as `published`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RegistryError(f"{out}: is already there and not empty; name another folder")
    trained = published(ref, home=home, needs_base=False)
    is_whole = not trained.keeps_base
    if form == "peft":
        _refuse_without_peft(trained, is_whole=is_whole)
    out = out.resolve()
    with new_folder(out) as staging:
        if form == "peft" or is_whole:
            shutil.copytree(trained.folder, staging, ignore=shutil.ignore_patterns(*OURS), dirs_exist_ok=True)
        else:
            _merge(trained, staging)


def _merge(trained: Trained, folder: Path) -> None:
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from models.methods import METHODS

    disable_progress_bar()
    set_verbosity_error()
    model, _ = trained.load()
    METHODS[trained.method].merge(model).save_pretrained(folder)
    trained.processor().save_pretrained(folder)
    shutil.copyfile(trained.folder / "README.md", folder / "README.md")
    for picture in trained.folder.glob("plot_*.png"):
        shutil.copyfile(picture, folder / picture.name)


def _refuse_without_peft(trained: Trained, *, is_whole: bool) -> None:
    if is_whole:
        raise RegistryError(f"{trained.name}: is a whole model and no adapter, so there is nothing for PEFT; use --format merged")
    if trained.method == "adapter":
        raise RegistryError(
            f"{trained.name}: PEFT has no bottleneck layers, so no format for them; hone's own is the published folder {trained.folder}, "
            f"which models.methods.METHODS['adapter'].load puts beside the base"
        )


def main(argv: list[str] | None = None) -> int:
    """Export one adapter; the exit code: 0 done, 1 a mistake (said in one line)."""
    parser = argparse.ArgumentParser(prog="python -m training.export_adapter")
    parser.add_argument("ref", help="NAME@VERSION")
    parser.add_argument("--format", required=True, choices=("merged", "peft"))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--home")
    args = parser.parse_args(argv)
    try:
        export_adapter(args.ref, form=args.format, out=args.out, home=Home(args.home))
    except HoneError as error:
        print(f"hone: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
